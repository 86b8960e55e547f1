// Numbers, scales and elements that all figures share.
const MINUS = "\u2212";

function number(value) {
  if (value === null || value === undefined) return "\u2013";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) {
    const [digits, power] = value.toExponential(2).split("e");
    return `${String(+digits).replace("-", MINUS)}e${power.replace("+", "").replace("-", MINUS)}`;
  }
  const text = size >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
  return text.replace("-", MINUS);
}

const count = (value) => value.toLocaleString("en");

function make(parent, name, attributes = {}, text = "") {
  const space = ["svg", "g", "path", "line", "circle", "rect", "text", "clipPath", "defs"].includes(name);
  const element = space ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function colour(element, name) {
  element.style.setProperty("--c", `var(--s-${name}, var(--s-other))`);
  return element;
}

function steps(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(k * step);
  return found;
}

function decades(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
    for (const k of [1, 2, 5]) found.push([k, k * 10 ** power]);
  const inside = found.filter(([, value]) => value >= low * 0.999 && value <= high * 1.001);
  const tens = inside.filter(([k]) => k === 1);
  return (tens.length >= 4 ? tens : inside).map(([, value]) => value);
}

function linear(low, high, from, to) {
  const scale = (value) => from + ((value - low) / (high - low || 1)) * (to - from);
  scale.ticks = (wanted) => steps(low, high, wanted);
  return scale;
}

function logarithmic(low, high, from, to) {
  const inner = linear(Math.log10(low), Math.log10(high), from, to);
  const scale = (value) => inner(Math.log10(value));
  scale.ticks = () => decades(low, high);
  return scale;
}

// A rectangle to draw in, with axes; `x` and `y` map values to pixels.
function frame(svg, width, height, x, y, edges, xticks, yticks) {
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  const [left, right, top, bottom] = edges;
  for (const tick of yticks) {
    make(svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) });
    make(svg, "text", { x: left - 9, y: y(tick) + 4, "text-anchor": "end" }, number(tick));
  }
  make(svg, "line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom });
  for (const tick of xticks) {
    const near = x(tick) > width - right - 14 ? "end" : "middle";
    make(svg, "text", { x: x(tick), y: height - bottom + 18, "text-anchor": near }, number(tick));
  }
}

function path(xs, values, x, y, usable) {
  let text = "";
  for (let k = 0; k < xs.length; k += 1) {
    const value = values[k];
    if (value !== null && usable(value)) text += `${text ? "L" : "M"}${x(xs[k]).toFixed(1)} ${y(value).toFixed(1)}`;
  }
  return text;
}

// Beside a place in a drawing, on the side where there is room.
function place(box, svg, x, y) {
  box.hidden = false;
  const figure = svg.parentNode, room = figure.clientWidth, wide = box.offsetWidth;
  const top = Math.max(0, y) + svg.getBoundingClientRect().top - figure.getBoundingClientRect().top;
  box.style.transform = `translate(${x + 16 + wide > room ? Math.max(0, x - wide - 16) : x + 16}px, ${top}px)`;
}

function entry(box, name, shape, label, value) {
  const row = make(box, "div");
  colour(make(row, "i", { class: shape }), name);
  make(row, "span", {}, label);
  make(row, "b", {}, value);
}

function onWidth(element, draw) {
  let last = 0;
  const again = () => {
    const width = Math.round(element.clientWidth);
    if (width && width !== last) draw((last = width));
  };
  new ResizeObserver(again).observe(element);
  again();
}
