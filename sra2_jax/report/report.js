// Comforts of report.html, inlined by page.py: values under the pointer, and a slider
// over the sample grids. Without it curves show last values and the strip is readable.
for (const chart of document.querySelectorAll("[data-points]")) {
  const points = chart.dataset.points.split(";").map(p => p.split("|"));
  const svg = chart.querySelector("svg"), out = chart.querySelector("output");
  const cursor = chart.querySelector(".cursor"), last = out.textContent;
  svg.addEventListener("pointermove", e => {
    const box = svg.getBoundingClientRect();
    const x = (e.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const p = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    cursor.querySelector("line").setAttribute("transform", `translate(${p[0]} 0)`);
    cursor.querySelector("circle").setAttribute("transform", `translate(${p[0]} ${p[1]})`);
    out.textContent = `${p[3]} at step ${p[2]}`;
    chart.classList.add("hover");
  });
  svg.addEventListener("pointerleave", () => {
    out.textContent = last;
    chart.classList.remove("hover");
  });
}
const film = document.querySelector(".film");
if (film) {
  const figures = [...film.querySelectorAll("figure")];
  const large = film.querySelector(".large"), control = film.querySelector(".control");
  const slider = control.querySelector("input");
  const show = i => {
    const small = figures[i].querySelector("img");
    large.src = small.src;
    large.alt = small.alt;
    large.classList.toggle("pixels", small.classList.contains("pixels"));
    control.querySelector("p").textContent = small.alt;
    slider.value = i;
    slider.setAttribute("aria-valuetext", small.alt);
    figures.forEach((f, j) => f.toggleAttribute("data-current", i === j));
  };
  figures.forEach((f, i) => f.addEventListener("click", () => show(i)));
  slider.addEventListener("input", () => show(+slider.value));
  large.hidden = false;
  control.hidden = figures.length < 2;
  film.classList.add("live");
  show(figures.length - 1);
}
