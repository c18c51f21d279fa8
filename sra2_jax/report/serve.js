// The page of `sra2 serve`: asks for the runs, draws those that are ticked, asks again.
const COLORS = ["#3178bd", "#d1495b", "#2e933c", "#b86e00", "#7b4fb5", "#00798c", "#8c6d4f", "#c2408f"];
const SHOWN = 4, EVERY = 5000, W = 360, H = 200;
const LEFT = 44, RIGHT = 12, TOP = 6, BOTTOM = 18;
const $ = selector => document.querySelector(selector);
const chosen = new Map();  // run -> ticked
const slider = $(".at input");
let runs = {}, last = true;  // last: the slider follows the newest step

const ask = async (path, query = {}) => {
  const reply = await fetch(`${path}?${new URLSearchParams(query)}`);
  if (!reply.ok) throw new Error(reply.statusText);
  return reply.json();
};
const make = (name, attributes = {}, ...children) => {
  const svg = ["svg", "path", "line", "text", "circle"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
const short = value => {
  if (value == null) return "–";
  for (const [unit, letter] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= unit) return +(value / unit).toPrecision(3) + letter;
  return String(+value.toPrecision(3));
};
const time = seconds => seconds == null ? "–"
  : seconds < 5400 ? `${Math.ceil(seconds / 60)} min`
  : seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
const color = name => COLORS[Object.keys(runs).indexOf(name) % COLORS.length];
const own = name => ({style: `--own: ${color(name)}`});
const ticked = () => Object.keys(runs).filter(name => chosen.get(name));

function list() {
  $(".runs tbody").replaceChildren(...Object.entries(runs).map(([name, r]) => {
    const box = make("input", {type: "checkbox"});
    box.checked = chosen.get(name);
    box.onchange = () => { chosen.set(name, box.checked); draw(); };
    const state = r.finished ? "finished" : r.running ? "running" : r.holder ? "lost, or hangs" : "stopped";
    const link = r.report
      ? [", ", make("a", {href: `file?${new URLSearchParams({run: name})}`}, "report")] : [];
    const bar = r.steps ? [make("progress", {value: r.step ?? 0, max: r.steps})] : [];
    return make("tr", own(name),
      make("td", {}, make("label", {}, box, name)),
      make("td", {}, r.step?.toLocaleString("en") ?? "–", ...bar),
      ...[short(r.loss), short(r.images_per_second), r.finished ? "–" : time(r.seconds_left)]
        .map(text => make("td", {}, text)),
      make("td", {}, state, ...link));
  }));
}

function samples() {
  const shown = ticked().filter(name => runs[name].grids.length);
  const steps = [...new Set(shown.flatMap(name => runs[name].grids))].sort((a, b) => a - b);
  slider.max = steps.length - 1;
  if (last) slider.value = slider.max;
  const step = steps[slider.value];
  $(".at").hidden = !steps.length;
  if (!steps.length) {
    $("#samples").replaceChildren(make("p", {class: "missing"}, "No samples yet."));
    return;
  }
  $(".at output").textContent = `step ${step.toLocaleString("en")}`;
  const figures = shown.map(name => {
    const caption = make("figcaption", {class: "key", ...own(name)}, name);
    if (!runs[name].grids.includes(step))
      return make("figure", {}, make("p", {class: "missing"}, "None at this step."), caption);
    const src = `file?${new URLSearchParams({run: name, step})}`;
    return make("figure", {}, make("img", {src, class: "pixels", alt: `samples of ${name} at step ${step}`}), caption);
  });
  // pictures that stay are kept: no flicker
  const key = figures.map(f => f.outerHTML).join();
  if (samples.key !== key) $("#samples").replaceChildren(...figures);
  samples.key = key;
}

// round numbers between two, about four
function ticks(low, high) {
  const rough = (high - low) / 4, ten = 10 ** Math.floor(Math.log10(rough));
  const step = ten * [1, 2, 5, 10].find(f => f * ten >= rough);
  const first = Math.ceil(low / step);
  return Array.from({length: Math.floor(high / step) - first + 1}, (_, i) => (first + i) * step);
}

function chart(title, lines) {
  const all = lines.flatMap(l => l.values).sort((a, b) => a - b);
  let low = all[Math.floor(0.005 * all.length)], high = all[Math.ceil(0.995 * (all.length - 1))];
  const margin = 0.06 * (high - low) || Math.abs(high) || 1;
  low = low >= 0 && low <= high / 3 ? 0 : low - margin;
  high += margin;
  const end = 1.02 * Math.max(1, ...lines.flatMap(l => l.steps));
  const x = step => LEFT + (W - LEFT - RIGHT) * step / end;
  const y = value => TOP + (H - BOTTOM - TOP) * (1 - (Math.min(Math.max(value, low), high) - low) / (high - low));
  const svg = make("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title} against step`});
  for (const value of ticks(low, high))
    svg.append(make("line", {x1: LEFT, x2: W, y1: y(value), y2: y(value)}),
      make("text", {x: LEFT - 6, y: y(value) + 3, "text-anchor": "end"}, short(value)));
  for (const step of ticks(0, end))
    svg.append(make("text", {x: x(step), y: H - 3, "text-anchor": step ? "middle" : "start"}, short(step)));
  for (const l of lines) {
    const points = l.steps.map((s, i) => [x(s), y(l.values[i])]);
    svg.append(make("path", {d: "M" + points.map(p => p.map(v => v.toFixed(1)).join(" ")).join("L"), ...own(l.run)}));
    if (points.length <= 40) for (const [cx, cy] of points) svg.append(make("circle", {cx, cy, r: 2.5, ...own(l.run)}));
  }
  const tip = make("p", {class: "tip"});
  const tell = at => {
    const spans = lines.map(l => {
      const i = Math.max(l.steps.findLastIndex(s => s <= at), 0);
      return make("span", {class: "key", ...own(l.run), title: l.run}, `${short(l.values[i])} at ${short(l.steps[i])}`);
    });
    tip.replaceChildren(...spans);
  };
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect();
    tell(end * ((event.clientX - box.left) / box.width * W - LEFT) / (W - LEFT - RIGHT));
  };
  svg.onpointerleave = () => tell(end);
  tell(end);
  return make("figure", {class: "chart"}, make("figcaption", {}, title), svg, tip);
}

async function curves() {
  const names = ticked();
  const found = await Promise.all(names.map(run => ask("curves", {run})));
  const by = new Map();
  found.forEach((rows, i) => rows.forEach(row => {
    if (!by.has(row.key)) by.set(row.key, []);
    by.get(row.key).push({...row, run: names[i]});
  }));
  const text = JSON.stringify([...by]);
  if (curves.text === text || $("#curves svg:hover")) return;
  curves.text = text;
  const charts = [...by.values()].map(lines => chart(lines[0].title, lines));
  $("#curves").replaceChildren(...charts);
  if (!charts.length) $("#curves").append(make("p", {class: "missing"}, "Nothing ticked, or nothing logged yet."));
}

async function draw() {
  samples();
  await curves();
}

async function refresh() {
  try {
    runs = await ask("runs");
    for (const name of Object.keys(runs))
      if (!chosen.has(name)) chosen.set(name, chosen.size < SHOWN);
    list();
    await draw();
    $("#heard").textContent = `${Object.keys(runs).length} found, read at ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    $("#heard").textContent = `The server does not answer (${error.message}): start sra2 serve again.`;
  }
  setTimeout(refresh, EVERY);
}
slider.oninput = () => { last = +slider.value === +slider.max; samples(); };
refresh();
