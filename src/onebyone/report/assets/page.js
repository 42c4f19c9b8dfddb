"use strict";

// Charts: each figure carries its data; the table beneath it is what is read without JavaScript.
(() => {
  if (typeof Plot === "undefined") return;
  const shade = (slot) => `var(--s${slot})`;
  const number = (value, percent) =>
    percent ? `${(100 * value).toFixed(2)} %` : String(Number(value.toPrecision(4)));

  // Names are the user's, of any length: in a chart their two ends are shown.
  const brief = (text, most = 40) => String(text).split("\n").map((line) => {
    const letters = Array.from(line); // whole ones: half an emoji is no text
    if (letters.length <= most) return line;
    return [...letters.slice(0, Math.ceil(most / 2) - 1), "…", ...letters.slice(-Math.floor(most / 2))].join("");
  }).join("\n");

  // Whole numbers alone: there is no half epoch.
  const wholes = (values, room) => {
    const low = Math.ceil(Math.min(...values)), high = Math.floor(Math.max(...values));
    const step = [1, 2, 5, 10, 20, 25, 50, 100, 200, 500].find((each) => (high - low) / each < room) ?? 1000;
    const first = step === 1 ? low : Math.ceil(low / step) * step;
    return Array.from({ length: Math.max(0, Math.floor((high - first) / step) + 1) }, (_, place) => first + step * place);
  };

  const lines = (data, width) => {
    const points = data.series.flatMap((series) =>
      series.points.map(([x, y, low, high]) => ({ x, y, low, high, name: series.name, color: series.color })));
    const bands = points.filter((point) => point.low !== undefined);
    const many = data.series.length > 1;
    const title = (point) =>
      `${many ? `${brief(point.name)}\n` : ""}${data.x} ${point.x}\n${data.y}: ${number(point.y, data.percent)}`;
    return Plot.plot({
      width,
      height: data.height,
      marginLeft: 56,
      marginRight: 16,
      marginBottom: 42,
      marginTop: 36,
      x: { label: data.x, ticks: wholes(points.map((point) => point.x), Math.floor(width / 60)), tickFormat: "d", inset: 6 },
      y: { label: data.y, grid: true, ticks: 5, inset: 6, tickFormat: data.percent ? (y) => `${Number((100 * y).toPrecision(4))} %` : undefined },
      marks: [
        Plot.areaY(bands, { x: "x", y1: "low", y2: "high", z: "name", fill: (p) => shade(p.color), fillOpacity: 0.16 }),
        Plot.ruleX(data.marks, { x: "x", stroke: "currentColor", strokeOpacity: 0.45, strokeDasharray: "3,3" }),
        Plot.text(data.marks, { x: "x", text: "label", frameAnchor: "top", lineAnchor: "bottom", dy: -3, fill: "currentColor", fontSize: 11 }),
        Plot.line(points, { x: "x", y: "y", z: "name", stroke: (p) => shade(p.color), strokeWidth: 2 }),
        Plot.dot(points, { x: "x", y: "y", r: points.length > 80 ? 0 : 2.5, fill: (p) => shade(p.color) }),
        Plot.tip(points, Plot.pointerX({ x: "x", y: "y", title, lineHeight: 1.4 })),
      ],
    });
  };

  // Plot has no logarithmic ticks that suit few decades: they are chosen here.
  const decades = (low, high, room) => {
    const steps = [[1], [1, 3], [1, 2, 5]].map((each) => {
      const ticks = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
        for (const step of each) {
          const tick = Number(`${step}e${power}`);
          if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
        }
      return ticks;
    });
    return steps.findLast((ticks) => ticks.length <= room) ?? steps[0];
  };
  const reach = (rows, zero) => {
    const values = [...rows.flatMap((row) => [row.low, row.high]), ...(zero === null ? [] : [zero])];
    return [Math.min(...values), Math.max(...values)];
  };

  const intervals = (data, width) => {
    const rows = data.rows.map(([name, value, low, high, color]) => ({ name, value, low, high, color }));
    const longest = Math.max(...rows.map((row) => brief(row.name, 28).length));
    return Plot.plot({
      width,
      height: 54 + 34 * rows.length,
      marginBottom: 42,
      marginLeft: Math.min(7.5 * longest + 20, width * 0.42),
      marginRight: 20,
      x: { label: data.x, grid: true, inset: 8, type: data.log ? "log" : "linear",
        ticks: data.log ? decades(...reach(rows, data.zero), Math.floor(width / 60)) : Math.floor(width / 110), tickFormat: data.percent ? (x) => `${Number((100 * x).toPrecision(4))} %` : data.log ? (x) => `${x}` : undefined },
      y: { label: null, domain: rows.map((row) => row.name), tickFormat: (name) => brief(name, width < 480 ? 20 : 28) },
      marks: [
        ...(data.zero === null ? [] : [Plot.ruleX([data.zero], { stroke: "currentColor", strokeOpacity: 0.45, strokeDasharray: "3,3" })]),
        Plot.ruleY(rows, { x1: "low", x2: "high", y: "name", stroke: (r) => shade(r.color), strokeWidth: 3, strokeLinecap: "round" }),
        Plot.dot(rows, { x: "value", y: "name", r: 5, fill: (r) => shade(r.color) }),
        Plot.tip(rows, Plot.pointerX({ x: "value", y: "name", lineHeight: 1.4, title: (r) =>
          `${brief(r.name)}\n${number(r.value, data.percent)} [${number(r.low, data.percent)} … ${number(r.high, data.percent)}]` })),
      ],
    });
  };

  // Points in two quantities.
  const tickText = (axis) => (value) => {
    const shown = axis.percent && !axis.signed ? `${Number((100 * value).toPrecision(3))} %`
      : String(Number((axis.percent ? 100 * value : value).toPrecision(3)));
    const sign = axis.signed && value > 0 ? "+" : "";
    return `${sign}${shown}`.replace("-", "\u2212") + (axis.unit === "×" ? "×" : "");
  };
  const scatter = (data, width) => {
    const all = [...data.points, ...data.lines.flatMap((line) => line.points.map(([x, y]) => ({ x, y })))];
    const scale = (axis, name, room) => {
      const values = all.flatMap((point) => [point[name], ...(point[`${name}i`] ?? [])]);
      if (axis.zero !== null) values.push(axis.zero);
      const low = Math.min(...values), high = Math.max(...values);
      return {
        label: axis.name, grid: true, inset: 12, type: axis.log ? "log" : "linear",
        ticks: axis.log ? decades(low, high, room) : room, tickFormat: tickText(axis),
      };
    };
    const points = data.points.filter((point) => !point.small);
    const chain = data.lines.flatMap((line, z) => line.points.map(([x, y, title]) => ({ x, y, title, z, color: line.color })));
    const shadeOf = (point) => shade(point.color);
    const dashes = { stroke: "currentColor", strokeOpacity: 0.45, strokeDasharray: "3,3" };
    return Plot.plot({
      width,
      height: data.height,
      marginLeft: 62,
      marginRight: 20,
      marginBottom: 42,
      marginTop: 36,
      x: scale(data.x, "x", Math.floor(width / 70)),
      y: scale(data.y, "y", 6),
      marks: [
        ...(data.x.zero === null ? [] : [Plot.ruleX([data.x.zero], dashes)]),
        ...(data.y.zero === null ? [] : [Plot.ruleY([data.y.zero], dashes)]),
        Plot.line(chain, { x: "x", y: "y", z: "z", stroke: shadeOf, strokeWidth: 2 }),
        Plot.dot(chain, { x: "x", y: "y", r: 3, fill: shadeOf }),
        Plot.dot(data.points.filter((point) => point.small), { x: "x", y: "y", r: 3, fill: shadeOf }),
        Plot.ruleY(points.filter((point) => point.xi), { x1: (p) => p.xi[0], x2: (p) => p.xi[1], y: "y", stroke: shadeOf, strokeWidth: 2, strokeOpacity: 0.6 }),
        Plot.ruleX(points.filter((point) => point.yi), { y1: (p) => p.yi[0], y2: (p) => p.yi[1], x: "x", stroke: shadeOf, strokeWidth: 2, strokeOpacity: 0.6 }),
        Plot.dot(points, { x: "x", y: "y", r: 6, fill: shadeOf, stroke: "var(--paper)", strokeWidth: 2 }),
        Plot.text(points.filter((point) => point.label), { x: "x", y: "y", text: (p) => brief(p.label, 20), dy: -13, fill: "currentColor", fontSize: 11, stroke: "var(--paper)", strokeWidth: 3 }),
        Plot.tip([...chain, ...data.points], Plot.pointerX({ x: "x", y: "y", title: (p) => brief(p.title), lineHeight: 1.4 })),
      ],
    });
  };

  const kinds = { lines, intervals, scatter };
  const draw = (figure) => {
    const data = JSON.parse(figure.dataset.chart);
    const canvas = figure.querySelector(".canvas");
    const width = Math.max(260, Math.min(canvas.clientWidth, 720));
    if (canvas.dataset.width === String(width)) return;
    canvas.dataset.width = String(width);
    const svg = kinds[data.kind](data, width);
    // Plot writes its tips on the page's background; the figure's label already says it in words.
    svg.style.setProperty("--plot-background", "var(--paper)");
    svg.setAttribute("aria-hidden", "true");
    svg.style.fontFamily = "inherit";
    svg.style.fontSize = "12px";
    canvas.replaceChildren(svg);
  };

  const figures = [...document.querySelectorAll("[data-chart]")];
  for (const figure of figures) {
    figure.querySelector("details")?.removeAttribute("open");
    draw(figure);
  }
  const watch = new ResizeObserver((entries) => entries.forEach(({ target }) => draw(target)));
  figures.forEach((figure) => watch.observe(figure));
})();

// The network: the facts of a layer, which its row holds, in a card beside the pointer or the focus.
(() => {
  const rows = new Map(
    [...document.querySelectorAll("[data-layer]")].map((row) => [row.dataset.layer, row]));
  if (rows.size === 0) return;
  const card = document.createElement("div");
  card.className = "card";
  card.hidden = true;
  card.setAttribute("aria-hidden", "true"); // the row itself says the same
  document.body.append(card);

  const place = (x, y) => {
    const { width, height } = card.getBoundingClientRect();
    const right = x + 16 + width > innerWidth ? Math.max(8, innerWidth - width - 8) : x + 16;
    const below = y + 18 + height > innerHeight ? Math.max(8, y - height - 14) : y + 18;
    card.style.left = `${right}px`;
    card.style.top = `${below}px`;
  };
  const show = (row, x, y) => {
    if (card.dataset.of !== row.dataset.layer) {
      const name = document.createElement("strong");
      const shown = row.querySelector(".name");
      name.textContent = shown.dataset.name ?? shown.textContent;
      card.replaceChildren(name, row.querySelector("dl").cloneNode(true));
      card.dataset.of = row.dataset.layer;
    }
    card.hidden = false;
    place(x, y);
  };
  let focused = null; // whose card the focus shows: it moves with its row
  const hide = () => { card.hidden = true; focused = null; };
  const showFocused = (row) => {
    const box = focused.getBoundingClientRect();
    show(row, box.left + Math.min(280, box.width / 2), box.bottom - 14);
  };
  const rowOf = (target) => {
    if (!(target instanceof Element)) return null;
    const segment = target.closest("[data-row]");
    if (segment) return rows.get(segment.dataset.row) ?? null;
    return target.closest("summary") ? target.closest("[data-layer]") : null;
  };

  const follow = (event) => {
    const row = rowOf(event.target);
    if (row && !(row.open && row.contains(event.target))) show(row, event.clientX, event.clientY);
    else hide();
  };
  document.addEventListener("pointermove", follow);
  document.addEventListener("pointerdown", (event) => {
    // A tap on a row opens it; a tap on a strip has only the card.
    if (event.pointerType === "mouse" || event.target.closest("summary")) hide();
    else follow(event);
  });
  document.addEventListener("focusin", (event) => {
    const row = rowOf(event.target);
    if (!row || row.open || !event.target.matches(":focus-visible")) return hide();
    focused = event.target;
    showFocused(row);
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", () => {
    if (focused) showFocused(rowOf(focused));
    else hide();
  }, { passive: true });
  document.addEventListener("toggle", hide, true);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // On paper nothing opens: the groups are shown whole, and closed again afterwards.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll(".group > details:not([open])")];
    opened.forEach((group) => { group.open = true; });
  });
  addEventListener("afterprint", () => { opened.forEach((group) => { group.open = false; }); });
})();
