// The times of steps: sigma against |r|, coloured by the sign of t.
class Scatter {
  constructor(figure, told) {
    Object.assign(this, { figure, points: told.points, hidden: new Set() });
    const signs = [[1, told.labels[0], "plain"], [-1, told.labels[1], "adversarial"]];
    this.signs = signs.map(([sign, label, tint]) => [sign, label, tint, this.points.filter((own) => own[3] === sign)]);
    const words = this.signs.map(([, label, , own]) => `${own.length} points ${label}`).join(", ");
    this.svg = make(figure, "svg", { role: "img", "aria-label": `${told.title}: ${words}` });
    this.read = make(figure, "div", { class: "read", hidden: "" });
    const list = make(figure, "div", { class: "legend" });
    for (const [sign, label, tint, own] of this.signs) this.toggle(list, sign, `${label} (${count(own.length)})`, tint);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => (this.read.hidden = true));
    onWidth(figure, (width) => this.draw(width));
  }

  toggle(list, sign, label, tint) {
    const button = make(list, "button", { type: "button", "aria-pressed": "true" });
    colour(make(button, "i", { class: "round" }), tint);
    make(button, "span", {}, label);
    button.addEventListener("click", () => {
      if (!this.hidden.delete(sign)) this.hidden.add(sign);
      button.setAttribute("aria-pressed", String(!this.hidden.has(sign)));
      this.draw(this.width);
    });
  }

  draw(width) {
    const height = Math.round(Math.min(580, width * 0.96)), edges = [54, 8, 10, 44];
    this.width = width;
    this.x = linear(0, 1, edges[0], width - edges[1]);
    this.y = linear(0, 1, height - edges[3], edges[2]);
    const ticks = [0, 0.2, 0.4, 0.6, 0.8, 1];
    frame(this.svg, width, height, this.x, this.y, edges, ticks, ticks);
    const middle = (edges[0] + width - edges[1]) / 2;
    make(this.svg, "text", { x: middle, y: height - 6, "text-anchor": "middle" }, "sigma = |t|  (1: noise, 0: data)");
    make(this.svg, "text", { x: edges[0] + 8, y: edges[2] + 11 }, "|r|");
    make(this.svg, "line", { class: "guide", x1: this.x(0), y1: this.y(0), x2: this.x(1), y2: this.y(1) });
    for (const [sign, , tint, own] of this.signs) {
      if (this.hidden.has(sign)) continue;
      const group = colour(make(this.svg, "g", { "data-sign": sign }), tint);
      for (const [, sigma, r] of own)
        make(group, "circle", { class: "dot", cx: this.x(sigma).toFixed(1), cy: this.y(r).toFixed(1), r: 2.6 });
    }
  }

  point(event) {
    const box = this.svg.getBoundingClientRect(), [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const far = (own) => Math.hypot(this.x(own[1]) - x, this.y(own[2]) - y);
    let best = null;
    for (const own of this.points)
      if (!this.hidden.has(own[3]) && far(own) < (best ? far(best) : 24)) best = own;
    this.read.replaceChildren();
    this.read.hidden = !best;
    if (!best) return;
    make(this.read, "div", { class: "title" }, `Step ${count(best[0])}`);
    const tint = best[3] > 0 ? "plain" : "adversarial";
    entry(this.read, tint, "round", "t", number(best[3] * best[1]));
    entry(this.read, tint, "round", "|r|", number(best[2]));
    place(this.read, this.svg, x, y - 50);
  }
}
