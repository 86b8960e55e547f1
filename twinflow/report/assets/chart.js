// Curves by step: a line for the smoothed mean, a thin one or a band for what it smooths, diamonds for evaluations.
class Chart {
  constructor(figure, told, run) {
    Object.assign(this, { figure, told, run, logarithmic: false, at: null });
    this.series = told.series.filter((own) => run.columns[own.column]);
    this.hidden = new Set();
    this.svg = make(figure, "svg", { role: "img", tabindex: "0", "aria-label": this.summary() });
    this.read = make(figure, "div", { class: "read", hidden: "", "aria-live": "polite" });
    if (this.series.length + told.points.length > 1) this.legend();
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.show(null));
    this.svg.addEventListener("blur", () => this.show(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    onWidth(figure, (width) => this.draw(width));
  }

  summary() {
    const own = this.series[0], seen = (this.run.columns[own?.column]?.smooth ?? []).filter((value) => value !== null);
    if (!seen.length) return this.told.title;
    const { first, last } = this.run;
    return `${this.told.title} by step, ${own.label} from ${number(seen[0])} at step ${first[0]} to ` +
      `${number(seen.at(-1))} at step ${last.at(-1)}; arrow keys read values`;
  }

  legend() {
    const list = make(this.figure, "div", { class: "legend" });
    const entries = [...this.series.map((own) => [own, ""]), ...this.told.points.map((own) => [own, "diamond"])];
    for (const [own, shape] of entries) {
      const button = make(list, "button", { type: "button", "aria-pressed": "true" });
      colour(make(button, "i", { class: shape }), own.colour);
      make(button, "span", {}, own.label);
      button.addEventListener("click", () => {
        const off = this.hidden.delete(own.label) ? false : Boolean(this.hidden.add(own.label));
        button.setAttribute("aria-pressed", String(!off));
        this.draw(this.width);
      });
    }
  }

  shown() {
    return this.series.filter((own) => !this.hidden.has(own.label));
  }

  usable(value) {
    return !this.logarithmic || value > 0;
  }

  range() {
    const values = this.shown().flatMap((own) => {
      const { mean, smooth } = this.run.columns[own.column];
      const sorted = mean.filter((value) => value !== null && this.usable(value)).sort((a, b) => a - b);
      const tail = Math.floor(sorted.length / 200); // single outliers may leave the picture
      return [...sorted.slice(tail, sorted.length - tail || undefined), ...smooth];
    });
    for (const own of this.told.points) if (!this.hidden.has(own.label)) values.push(...own.values);
    const fit = values.filter((value) => value !== null && this.usable(value));
    let low = Infinity, high = -Infinity;
    for (const value of fit) [low, high] = [Math.min(low, value), Math.max(high, value)];
    if (!fit.length) return this.logarithmic ? [0.1, 1] : [0, 1];
    if (this.logarithmic) return low === high ? [low / 2, high * 2] : [low * 0.94, high * 1.06];
    if (low >= 0 && (this.told.zero || low < 0.4 * high)) low = 0;
    const room = (high - low || Math.abs(high) || 1) * 0.05;
    return [low === 0 ? 0 : low - room, high + room];
  }

  draw(width) {
    const { run, told, svg } = this, height = told.height, edges = [54, 8, 10, 28];
    this.width = width;
    const [low, high] = this.range(), [start, end] = run.range;
    const x = (this.x = linear(start, end, edges[0], width - edges[1]));
    const y = (this.y = (this.logarithmic ? logarithmic : linear)(low, high, height - edges[3], edges[2]));
    frame(svg, width, height, x, y, edges, x.ticks(width / 110), y.ticks(height / 52));
    const id = `clip-${told.id}`;
    make(make(make(svg, "defs"), "clipPath", { id }), "rect", {
      x: edges[0], y: edges[2] - 2, width: width - edges[0] - edges[1], height: height - edges[2] - edges[3] + 3,
    });
    for (const step of run.resumes) this.resume(step, height, edges);
    const inside = make(svg, "g", { "clip-path": `url(#${id})` });
    for (const own of this.shown().slice().reverse()) this.curve(inside, own);
    for (const own of told.points) if (!this.hidden.has(own.label)) this.points(inside, own);
    this.cursor = make(svg, "g");
    this.show(null);
  }

  resume(step, height, edges) {
    const at = this.x(step), late = at > this.width - 90;
    make(this.svg, "line", { class: "resume", x1: at, x2: at, y1: edges[2], y2: height - edges[3] });
    const words = { x: at + (late ? -6 : 6), y: edges[2] + 9, "text-anchor": late ? "end" : "start" };
    if (this.told.height > 200) make(this.svg, "text", words, "resumed");
  }

  curve(parent, own) {
    const { mean, low, high, smooth } = this.run.columns[own.column], xs = this.run.last;
    const group = colour(make(parent, "g", { "data-series": own.label }), own.colour);
    const draw = (values) => path(xs, values, this.x, this.y, (value) => this.usable(value));
    if (low) {
      const back = path([...xs].reverse(), [...low].reverse(), this.x, this.y, (value) => this.usable(value));
      make(group, "path", { class: "band", d: `${draw(high)}${back.replace("M", "L")}Z` });
    } else if (own.raw !== false) make(group, "path", { class: "raw", d: draw(mean) });
    make(group, "path", { class: "line", d: draw(own.raw === false ? mean : smooth) });
  }

  points(parent, own) {
    const group = colour(make(parent, "g", { "data-series": own.label }), own.colour);
    own.steps.forEach((step, k) => {
      if (own.values[k] === null || !this.usable(own.values[k])) return;
      const [x, y] = [this.x(step), this.y(own.values[k])];
      make(group, "path", { class: "point", d: `M${x} ${y - 5.5}l5.5 5.5l-5.5 5.5l-5.5 -5.5Z` });
    });
  }

  point(event) {
    const box = this.svg.getBoundingClientRect(), wanted = event.clientX - box.left, { last } = this.run;
    let best = 0;
    last.forEach((step, k) => {
      if (Math.abs(this.x(step) - wanted) < Math.abs(this.x(last[best]) - wanted)) best = k;
    });
    if (last.length) this.show(best);
  }

  key(event) {
    const size = this.run.last.length, move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.show(null);
    if (!move || !size) return;
    event.preventDefault();
    this.show(Math.min(size - 1, Math.max(0, (this.at ?? (move > 0 ? -1 : size)) + move * (event.shiftKey ? 10 : 1))));
  }

  show(k) {
    this.at = k;
    this.cursor.replaceChildren();
    this.read.replaceChildren();
    this.read.hidden = k === null;
    if (k === null) return;
    const { first, last, columns } = this.run, at = this.x(last[k]);
    make(this.cursor, "line", { class: "axis", x1: at, x2: at, y1: 10, y2: this.told.height - 28 });
    const title = first[k] === last[k] ? `Step ${count(last[k])}` : `Steps ${count(first[k])}\u2013${count(last[k])}`;
    make(this.read, "div", { class: "title" }, title);
    for (const own of this.shown()) {
      const column = columns[own.column], value = column.mean[k], drawn = own.raw === false ? value : column.smooth[k];
      entry(this.read, own.colour, "", own.label, number(value) + (value === null ? "" : own.unit));
      if (drawn !== null && this.usable(drawn))
        colour(make(this.cursor, "circle", { class: "at", cx: at, cy: this.y(drawn), r: 4 }), own.colour);
    }
    for (const own of this.told.points) {
      const near = this.hidden.has(own.label) ? -1 : own.steps.findIndex((step) => step >= first[k] && step <= last[k]);
      if (near >= 0) entry(this.read, own.colour, "diamond", own.label, number(own.values[near]));
    }
    place(this.read, this.svg, at, 8);
  }
}
