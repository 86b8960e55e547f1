// Images that the run drew, a set at a time, the base model's beside them.
class Samples {
  constructor(root, told, total) {
    Object.assign(this, { told, total, at: told.sets.length - 1, grid: root.querySelector(".set") });
    this.slider = root.querySelector("input");
    this.output = root.querySelector("output");
    this.dialog = root.querySelector("dialog");
    [this.back, this.forth] = root.querySelectorAll(".slider button");
    this.columns = [...told.columns, ...told.baseColumns];
    this.build();
    this.dialog.addEventListener("click", () => this.dialog.close());
    if (!told.sets.length) return;
    this.slider.max = this.at;
    for (let k = 0; k <= this.at && this.at <= 60; k += 1) make(root.querySelector("datalist"), "option", { value: k });
    this.slider.addEventListener("input", () => this.show(Number(this.slider.value)));
    this.back.addEventListener("click", () => this.show(this.at - 1));
    this.forth.addEventListener("click", () => this.show(this.at + 1));
    document.addEventListener("keydown", (event) => this.key(event));
    this.show(this.at);
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const elsewhere = event.target.closest?.("svg"); // a chart reads its values by these keys
    if (!move || elsewhere || event.altKey || event.ctrlKey || event.metaKey || this.dialog.open) return;
    event.preventDefault();
    this.show(this.at + move);
  }

  build() {
    const { told } = this, images = this.columns.length;
    const narrow = matchMedia("(max-width: 46rem)");
    const lay = () => {
      const full = narrow.matches || images > 3, most = full ? "1fr" : "14rem";
      const name = narrow.matches ? "" : `minmax(9rem, ${full ? "1.05fr" : "16rem"}) `;
      this.grid.style.gridTemplateColumns = `${name}repeat(${images}, minmax(0, ${most}))`;
    };
    narrow.addEventListener("change", lay);
    lay();
    make(this.grid, "span", { class: "corner" });
    for (const column of this.columns) {
      const head = make(this.grid, "div", { class: column.base ? "name base" : "name" });
      make(head, "b", {}, column.title);
      make(head, "span", {}, column.under);
    }
    this.cells = this.told.rows.map((row) => {
      make(this.grid, "p", { class: "prompt", title: row.prompt }, row.prompt || "(no prompt)");
      return this.columns.map((column) => make(this.grid, "div", { class: column.base ? "base" : "" }));
    });
    this.each((row, k, column) => {
      if (column.base) this.put(this.cells[row][k], told.base[row][column.number], row, "base model");
    });
  }

  each(work) {
    this.told.rows.forEach((_, row) => this.columns.forEach((column, k) => work(row, k, column)));
  }

  show(at) {
    this.at = Math.min(this.told.sets.length - 1, Math.max(0, at));
    const set = this.told.sets[this.at], words = `Step ${count(set.step)}`;
    this.slider.value = this.at;
    this.slider.setAttribute("aria-valuetext", `${words}, ${set.weights}`);
    this.output.replaceChildren(`${words}${this.total ? ` of ${count(this.total)}` : ""}`);
    make(this.output, "small", {}, set.weights);
    this.back.disabled = this.at === 0;
    this.forth.disabled = this.at === this.told.sets.length - 1;
    this.grid.dataset.step = set.step;
    this.each((row, k, column) => {
      if (!column.base) this.put(this.cells[row][k], set.images[row][column.number], row, `${words}, ${set.weights}`);
    });
  }

  put(cell, image, row, whose) {
    if (!image || !image.uri) {
      cell.replaceChildren(make(null, "div", { class: "gone" }, image ? "cannot be read" : "not drawn"));
      return;
    }
    let button = cell.querySelector("button");
    if (!button) {
      cell.replaceChildren((button = make(null, "button", { type: "button" })));
      const shown = make(button, "img", { decoding: "sync" });
      shown.addEventListener("load", () => shown.classList.toggle("tiny", shown.naturalWidth <= 128));
      button.addEventListener("click", () => this.enlarge(button.about));
    }
    button.about = [image, this.told.rows[row].prompt, whose];
    button.firstChild.src = image.uri;
    button.firstChild.alt = `${whose}, ${image.words}: ${this.told.rows[row].prompt}`;
  }

  enlarge([image, prompt, whose]) {
    const [shown, first, second] = [this.dialog.querySelector("img"), ...this.dialog.querySelectorAll("p")];
    shown.src = image.uri;
    shown.alt = prompt;
    shown.classList.toggle("tiny", shown.naturalWidth <= 128);
    first.textContent = prompt;
    second.textContent = `${whose}, ${image.words}`;
    this.dialog.showModal();
  }
}
