"use strict";
// Draws what the page carries as JSON, and sorts and filters the table. No law is evaluated here, nothing is fetched.
(() => {
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const W = 720, H = 400, L = 64, R = 16, T = 12, B = 46;
  const make = (name, attributes, parent, text) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };
  const count = (x) => {
    for (const [unit, size] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e3]]) {
      if (x >= size * 1e3 && unit === "T") return x.toExponential(0);
      if (x >= size) return +(x / size).toPrecision(3) + unit;
    }
    return String(+x.toPrecision(3));
  };
  const power = (x) => x.toExponential(1).replace(".0", "").replace("+", "");
  const ticks = (low, high) => {
    const span = Math.log10(high / low), factors = span > 4 ? [1] : span > 1.2 ? [1, 3] : span > 0.5 ? [1, 1.5, 2, 3, 5, 7] : null;
    if (!factors) {
      const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
      const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw);
      return Array.from({ length: 12 }, (_, i) => (Math.ceil(low / step) + i) * step).filter((x) => x <= high);
    }
    const found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
      for (const f of factors) if (f * 10 ** p >= low && f * 10 ** p <= high) found.push(f * 10 ** p);
    return found;
  };

  const chart = $("chart");
  if (chart) {
    const data = JSON.parse($("chart-data").textContent);
    const view = $("view"), convention = $("convention"), out = $("show-out"), law = $("show-law"), slider = $("compute");
    const said = $("hovered");
    const labels = {
      params: ["parameters (N)", "loss"], tokens: ["training tokens (D)", "loss"],
      flops: ["training FLOPs (C = 6 N D)", "loss"], optimum: ["training FLOPs (C = 6 N D)", "best parameters (N*)"],
    };
    const draw = () => {
      const of = data.conventions[convention.value], kind = view.value;
      const x = (c) => ({ params: c.n[convention.value], tokens: c.tokens }[kind] ?? 6 * c.n[convention.value] * c.tokens);
      const cells = kind === "optimum" ? [] : data.cells.filter((c) => (out.checked || !c.out) && x(c) > 0);
      const lines = law.checked ? (of.lines[kind] ?? []) : [];
      const chosen = [...document.querySelectorAll("input[name=estimator]:checked")].map((box) => box.value);
      const estimators = kind === "optimum" ? chosen.filter((name) => of.estimators[name]) : [];
      const stop = of.stops[Number(slider?.value ?? 0)];
      const points = [...cells.map((c) => [x(c), c.loss]), ...estimators.flatMap((name) => of.estimators[name])];
      for (const line of lines) for (const [a, ...values] of line.points ?? line.band) for (const b of values) points.push([a, b]);
      if (stop && (kind === "flops" || kind === "optimum") && law.checked) points.push([stop.flops, kind === "flops" ? stop.loss : stop.n]);
      chart.replaceChildren();
      if (!points.length) { make("text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, chart, "nothing to show"); return; }
      const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
      const bound = (v, pad) => { const a = v.reduce((m, k) => Math.min(m, k)), b = v.reduce((m, k) => Math.max(m, k)); const r = Math.max((b / a) ** pad, 1.01); return [a / r, b * r]; };
      const [x0, x1] = bound(xs, 0.04), [y0, y1] = bound(ys, 0.06);
      const px = (v) => L + (W - L - R) * Math.log(v / x0) / Math.log(x1 / x0);
      const py = (v) => T + (H - T - B) * (1 - Math.log(Math.min(Math.max(v, y0), y1) / y0) / Math.log(y1 / y0));
      for (const t of ticks(x0, x1)) {
        make("line", { x1: px(t), x2: px(t), y1: T, y2: H - B, class: "grid" }, chart);
        make("text", { x: px(t), y: H - B + 16, "text-anchor": "middle" }, chart, kind === "params" || kind === "tokens" ? count(t) : power(t));
      }
      for (const t of ticks(y0, y1)) {
        make("line", { x1: L, x2: W - R, y1: py(t), y2: py(t), class: "grid" }, chart);
        make("text", { x: L - 6, y: py(t) + 4, "text-anchor": "end" }, chart, count(t));
      }
      make("text", { x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle" }, chart, labels[kind][0]);
      make("text", { x: 14, y: (T + H - B) / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${(T + H - B) / 2})` }, chart, labels[kind][1]);
      const path = (list) => "M" + list.map(([a, b]) => `${px(a).toFixed(1)},${py(b).toFixed(1)}`).join("L");
      lines.forEach((line, i) => {
        if (line.band) {
          const low = line.band.map((p) => [p[0], p[2]]), high = line.band.map((p) => [p[0], p[3]]).reverse();
          make("path", { d: path([...low, ...high]) + "Z", class: "band" }, chart);
        }
        const drawn = (line.points ?? line.band).map((p) => [p[0], p[1]]);
        make("path", { d: path(drawn), class: `law s${Math.round(7 * i / Math.max(lines.length - 1, 1))}` }, chart);
        const end = drawn[drawn.length - 1];
        make("text", { x: W - R - 2, y: py(end[1]) - 4, "text-anchor": "end", class: "end" }, chart, line.label);
      });
      estimators.forEach((name, i) => {
        for (const [a, b] of of.estimators[name]) mark(make("circle", { cx: px(a), cy: py(b), r: 4, class: `estimator s${i * 2}` }, chart), `${name}: best N ${count(b)} at ${a.toExponential(2)} FLOPs`);
      });
      for (const c of cells) {
        const text = `${c.id}: N ${count(c.n[convention.value])}, D ${count(c.tokens)}, loss ${c.loss.toFixed(4)}${c.out ? `; not fitted: ${c.out}` : ""}`;
        mark(make("circle", { cx: px(x(c)), cy: py(c.loss), r: 4, class: c.out ? "cell out" : "cell" }, chart), text);
      }
      if (stop && law.checked && (kind === "flops" || kind === "optimum"))
        make("circle", { cx: px(stop.flops), cy: py(kind === "flops" ? stop.loss : stop.n), r: 6, class: "stop" }, chart);
      chart.setAttribute("aria-label", `${labels[kind][1]} against ${labels[kind][0]}: ${cells.length} cells, ${lines.length} lines`);
    };
    const mark = (node, text) => {
      node.dataset.text = text;
      make("title", {}, node, text);
    };
    const tell = (event) => { const text = event.target.dataset?.text; if (text) said.textContent = text; };
    chart.addEventListener("pointerover", tell);
    chart.addEventListener("click", tell);
    const step = () => {
      const stop = data.conventions[convention.value].stops[Number(slider?.value ?? 0)];
      for (const part of ["flops", "reach", "n", "d", "loss"]) if ($(`stop-${part}`)) $(`stop-${part}`).textContent = stop ? stop.text[part] : "no law was fitted";
      slider?.setAttribute("aria-valuetext", stop ? stop.text.flops : "");
      draw();
    };
    for (const node of [view, convention, out, law, slider, ...document.querySelectorAll("input[name=estimator]")]) node?.addEventListener("input", step);
    step();
  }

  const table = $("cells-table");
  if (table) {
    const body = table.tBodies[0], rows = [...body.rows], shown = $("rows-shown"), filter = $("filter");
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const most = Number(table.dataset.most);  // rows that are laid out at once: a browser takes seconds over ten thousand
    let order = rows.map((_, i) => i);
    const show = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let n = 0;
      for (const i of order) {
        const fits = words.every((word) => texts[i].includes(word));
        n += fits;
        rows[i].hidden = !fits || n > most;
      }
      shown.textContent = `${n} of ${rows.length} cells` + (n > most ? `, the first ${most} shown` : "");
    };
    const key = (cell) => cell.dataset.v === undefined ? cell.textContent : cell.dataset.v === "" ? null : Number(cell.dataset.v);
    const compare = (a, b) => (a === null) - (b === null) || (typeof a === "number" ? a - b : String(a).localeCompare(String(b)));
    table.tHead.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const head = button.parentElement, at = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = rows.map((row, i) => [key(row.cells[at]), i, row]);
      keyed.sort((a, b) => (a[0] === null || b[0] === null ? compare(a[0], b[0]) : (down ? -1 : 1) * compare(a[0], b[0])) || a[1] - b[1]);
      order = keyed.map(([, i]) => i);
      const sorted = document.createDocumentFragment();
      for (const [, , row] of keyed) { row.hidden = true; sorted.append(row); }
      body.append(sorted);
      show();
    });
    filter.addEventListener("input", show);
  }
})();
