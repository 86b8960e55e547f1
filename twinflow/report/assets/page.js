const told = JSON.parse(document.getElementById("data").textContent);

const charts = told.charts.map((own) => new Chart(document.querySelector(`[data-chart="${own.id}"]`), own, told.run));
for (const buttons of document.querySelectorAll("[data-scale]")) {
  const chart = charts.find((own) => own.told.id === buttons.dataset.scale);
  for (const button of buttons.children)
    button.addEventListener("click", () => {
      for (const other of buttons.children) other.setAttribute("aria-pressed", String(other === button));
      chart.logarithmic = button.dataset.kind === "log";
      chart.draw(chart.width);
    });
}
const scatter = document.querySelector("[data-scatter]");
if (scatter) new Scatter(scatter, told.scatter);
const samples = document.querySelector("[data-samples]");
if (samples) new Samples(samples, told.samples, told.total);
for (const buttons of document.querySelectorAll("[data-only]"))
  for (const button of buttons.children)
    button.addEventListener("click", () => {
      for (const other of buttons.children) other.setAttribute("aria-pressed", String(other === button));
      document.querySelector(".tables").classList.toggle("only", button.dataset.kind === "changed");
    });
document.documentElement.dataset.drawn = "yes";
