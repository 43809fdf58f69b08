"use strict";
// Selectors, tables and themes. Figures are drawn by Plotly from data/*.js files; there is no chart code here.
const REPORT_DATA = {};
const dark = matchMedia("(prefers-color-scheme: dark)");
const loading = {};

function element(tag, parent, text) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// A page opened from a file may load scripts but not fetch JSON, so data are scripts.
function load(file) {
  loading[file] ??= new Promise((done, failed) => {
    const script = element("script");
    script.src = `site/${file}.js`;
    script.onload = done;
    script.onerror = () => failed(new Error(`site/${file}.js cannot be read; write the site again`));
    document.head.append(script);
  });
  return loading[file];
}

// A map holds the lower triangle on 256 levels, two hexadecimal digits each; low and high are log10 of the ends.
function fill(trace, map) {
  const { cells, n, low, high, levels } = map, value = [], custom = [];
  const block = (i) => Math.floor(((i + 0.5) * trace.blocks) / cells) + 1;
  let at = 0;
  for (let i = 0; i < cells; i++) {
    value.push(new Array(cells));
    for (let j = 0; j <= i; j++, at += 2) {
      value[i][j] = value[j][i] = low + ((high - low) * parseInt(levels.substr(at, 2), 16)) / 255;
    }
  }
  for (let i = 0; i < cells; i++) custom.push(value[i].map((v, j) => [10 ** v, block(i), block(j)]));
  trace.z = value;
  trace.customdata = custom;
}

function themed(figure, levels) {
  const theme = THEMES[dark.matches ? "dark" : "light"];
  let text = JSON.stringify({ data: figure.data, layout: figure.layout });
  for (const [from, to] of Object.entries(theme.swap)) text = text.replaceAll(`"${from}"`, `"${to}"`);
  const made = JSON.parse(text);
  for (const trace of made.data) if (trace.levels) fill(trace, levels[trace.levels]);
  made.layout.template = theme.template;
  made.layout.autosize = true;
  return made;
}

// Plotly has a button that uploads a chart; this site never speaks to a network.
const CONFIG = {
  responsive: true,
  displaylogo: false,
  scrollZoom: false,
  plotlyServerURL: "",
  modeBarButtonsToRemove: ["sendChartToCloud", "sendDataToCloud", "select2d", "lasso2d"],
};

class Pictures {
  constructor(root) {
    this.root = root;
    const { dimensions, first, index } = JSON.parse(root.querySelector("script").textContent);
    this.index = index;
    this.bar = element("div");
    this.bar.className = "selectors";
    root.prepend(this.bar);
    this.selects = dimensions.map((name) => this.select(name));
    this.zoom = this.select("zoom");
    this.plot = root.querySelector(".plot");
    this.selects.forEach((select, place) => select.addEventListener("change", () => this.choose(place)));
    this.zoom.addEventListener("change", () => this.zoomed());
    dark.addEventListener("change", () => this.draw());
    this.options(0);
    first.forEach((value, place) => {
      this.selects[place].value = value;
      this.options(place + 1);
    });
  }

  select(name) {
    const label = element("label", this.bar, name), select = element("select", label);
    label.hidden = true;
    return select;
  }

  // The options of a selector are those that exist with the choices to its left; a choice is kept where it exists.
  options(from) {
    let left = this.index.filter(({ choice }) => this.selects.slice(0, from).every((s, i) => s.value === choice[i]));
    this.selects.forEach((select, place) => {
      if (place >= from) {
        const before = select.value, names = [...new Set(left.map(({ choice }) => choice[place]))];
        select.replaceChildren(...names.map((name) => new Option(name)));
        select.value = names.includes(before) ? before : names[0];
        select.parentElement.hidden = new Set(this.index.map(({ choice }) => choice[place])).size < 2;
      }
      left = left.filter(({ choice }) => choice[place] === select.value);
    });
    this.chosen = left[0];
  }

  async choose(place) {
    this.options(place + 1);
    await this.draw();
  }

  async draw() {
    const { file, figure: name } = this.chosen;
    try {
      await load(file);
    } catch (error) {
      this.plot.textContent = error.message;
      return;
    }
    if (this.chosen.figure !== name) return;
    const held = REPORT_DATA[file], figure = held.figures[name];
    const { data, layout } = themed(figure, held.levels);
    if (figure.square) layout.height = Math.min(layout.height, this.plot.clientWidth + 130);
    // On a narrow screen, the legend has a line for each trace.
    if (this.plot.clientWidth < 500) layout.height += 20 * data.filter((trace) => trace.showlegend !== false && trace.name).length;
    this.plot.style.minHeight = `${layout.height}px`;
    this.plot.setAttribute("aria-label", figure.alt);
    // Not react(): it keeps how the axes of the figure before were constrained.
    await Plotly.newPlot(this.plot, data, layout, CONFIG);
    this.plot.style.minHeight = "";
    this.root.querySelector("figcaption").textContent = figure.caption;
    this.facts(figure.facts);
    this.zoom.parentElement.hidden = !figure.zooms.length;
    this.zoom.replaceChildren(...figure.zooms.map(([part]) => new Option(part)));
    this.figure = figure;
    this.root.dataset.drawn = name;
  }

  facts(facts) {
    const list = this.root.querySelector(".facts");
    list.replaceChildren();
    for (const [name, value] of facts) {
      const pair = element("div", list);
      element("dt", pair, name);
      element("dd", pair, value);
    }
  }

  zoomed() {
    const [low, high] = this.figure.zooms[this.zoom.selectedIndex][1];
    Plotly.relayout(this.plot, { "xaxis.range": [low, high], "yaxis.range": [high, low] });
  }
}

class Table {
  constructor(root) {
    this.body = root.querySelector("tbody");
    this.rows = [...this.body.rows];
    this.heads = [...root.querySelectorAll("th")];
    this.heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => this.sort(place)));
    this.filters = [...root.querySelectorAll(".filters select")];
    this.search = root.querySelector(".filters input");
    this.count = root.querySelector(".count");
    for (const filter of this.filters) filter.addEventListener("change", () => this.filter());
    this.search?.addEventListener("input", () => this.filter());
    this.filter();
  }

  // Cells without a value stay last in either direction.
  sort(place) {
    const head = this.heads[place], ascending = head.getAttribute("aria-sort") !== "ascending";
    this.heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const numeric = head.classList.contains("number"), key = (row) => row.cells[place].dataset.value;
    const compare = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b)) * (ascending ? 1 : -1);
    this.rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      return x === "" || y === "" ? (x === "") - (y === "") : compare(x, y);
    });
    this.body.append(...this.rows);
  }

  filter() {
    const words = (this.search?.value ?? "").toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of this.rows) {
      const fits = this.filters.every((f) => !f.value || row.cells[f.dataset.column].textContent.trim() === f.value);
      row.hidden = !(fits && words.every((word) => row.textContent.toLowerCase().includes(word)));
      shown += !row.hidden;
    }
    if (this.count) this.count.textContent = `${shown} of ${this.rows.length} rows`;
  }
}

addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".sortable").forEach((root) => new Table(root));
  // A figure is drawn when it comes near the screen.
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) {
        near.unobserve(target);
        target.pictures.draw();
      }
    }
  }, { rootMargin: "600px" });
  document.querySelectorAll(".pictures").forEach((root) => {
    root.pictures = new Pictures(root);
    near.observe(root);
  });
});
