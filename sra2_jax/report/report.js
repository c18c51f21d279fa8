// A slider over the sample grids of report.html, inlined by page.py. Without it the
// strip is readable.
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
