"use strict";
// Draws the panels of the facts in the page. Nothing is fetched: the facts lie in the page as JSON.
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const COLOURS = 6, LOST = "lost";
  // Two take turns where attempts are so many that colours no longer tell them apart.
  const attempts = facts.panels.length ? new Set(facts.panels[0].series[0].curves.map((curve) => curve.attempt)).size : 0;
  const TURNS = attempts > 2 * COLOURS ? 2 : COLOURS;
  let axis = "steps";
  const made = new Map(); // element -> its chart

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const faded = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

  function shown(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(3);
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(5)));
  }
  function short(value) {
    const units = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
    for (const [size, unit] of units) if (Math.abs(value) >= size) return Number((value / size).toPrecision(4)) + unit;
    return Math.abs(value) < 1e-3 && value !== 0 ? value.toExponential(0) : String(Number(value.toPrecision(4)));
  }
  const ages = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  function span(seconds) {
    for (const [size, unit] of ages) if (Math.abs(seconds) >= size) return Number((seconds / size).toFixed(2)) + " " + unit;
    return Number(seconds.toFixed(2)) + " s";
  }

  // Curves that do not overlap share a line; what was rolled back is a line, or several, of its own.
  function lines(panel, whole) {
    const many = panel.series.length > 1, branches = panel.key === "branches", found = [];
    panel.series.forEach((series, place) => {
      const groups = new Map();
      const layers = [];
      for (const curve of series.curves) {
        let key;
        if (!curve.survives && !whole) {
          let layer = layers.findIndex((end) => end < curve.steps[0]);
          if (layer < 0) layer = layers.push(-1) - 1;
          layers[layer] = curve.steps[curve.steps.length - 1];
          key = LOST + layer;
        } else key = many ? "kept" : "kept" + (curve.attempt % TURNS);
        if (!groups.has(key)) groups.set(key, []);
        groups.get(key).push(curve);
      }
      for (const [key, curves] of groups) {
        const lost = key.startsWith(LOST);
        const numbers = [...new Set(curves.map((curve) => curve.attempt))];
        const who = numbers.length > 4 ? `attempts ${numbers[0]}, ${numbers[1]} … ${numbers[numbers.length - 1]}` : `attempt ${numbers.join(", ")}`;
        const ofGroup = many && !branches;
        const name = branches ? `${series.name} (${who})` : many ? series.name : lost ? `rolled back (${who})` : who;
        const base = ofGroup ? "c" + (place % COLOURS) : lost ? "lost" : "c" + ((numbers[0] - 1) % TURNS);
        const dash = ofGroup && (place >= COLOURS || series.name === "planned");
        found.push({ name, curves, lost, base, dash, shadow: ofGroup && lost ? series.name : "" });
      }
    });
    return found;
  }

  // A null between two pieces is a gap; what `join` adds for other lines is none.
  function table(line, xs, log, whole) {
    const x = [], y = [];
    for (const curve of line.curves) {
      if (x.length && !whole) { x.push(x[x.length - 1] + 1e-6); y.push(null); }
      curve[xs].forEach((at, i) => {
        const value = curve.values[i];
        if (!x.length || at > x[x.length - 1]) { x.push(at); y.push(log && value <= 0 ? null : value); }
      });
    }
    return [x, y];
  }

  function ends(xs) {
    let least = Infinity, most = -Infinity;
    for (const panel of facts.panels) for (const series of panel.series) for (const curve of series.curves)
      for (const at of curve[xs]) { least = Math.min(least, at); most = Math.max(most, at); }
    return [least, most];
  }

  // Where incidents were, behind the curves, and updates whose loss was not a number, below them.
  function marks(u, kind) {
    const context = u.ctx, { left, top, width, height } = u.bbox;
    context.save();
    context.beginPath(); context.rect(left, top, width, height); context.clip();
    if (kind === "main" && axis === "steps") for (const one of facts.incidents) {
      const from = u.valToPos(one.onset_step, "x", true);
      const to = u.valToPos(one.end_step ?? facts.verdict.step, "x", true);
      const tone = one.kind === "bad" ? "bad" : one.of_training && one.kind !== "info" ? "band" : "info";
      context.fillStyle = faded(colour(tone), tone === "info" ? 0.1 : 0.2);
      context.fillRect(from, top, Math.max(to - from, 2 * devicePixelRatio), height);
    }
    if (kind === "main" && axis === "steps") {
      context.fillStyle = colour("bad");
      for (const step of facts.totals.non_finite_steps)
        context.fillRect(u.valToPos(step, "x", true), top + height - 8 * devicePixelRatio, 2, 8 * devicePixelRatio);
    }
    if (typeof kind === "number") {
      const at = u.valToPos(kind, "x", true);
      context.strokeStyle = colour("band"); context.lineWidth = devicePixelRatio;
      context.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
      context.beginPath(); context.moveTo(at, top); context.lineTo(at, top + height); context.stroke();
    }
    context.restore();
  }

  function draw(element) {
    const { panel, kind, title, xs } = element.drawing;
    if (made.has(element)) { made.get(element).destroy(); made.delete(element); }
    const along = kind === "main" ? axis : "steps";
    const whole = typeof kind === "number"; // a black box is of one attempt, whatever became of its steps
    const found = lines(panel, whole);
    if (!found.length) return;
    const tables = found.map((line) => table(line, along, panel.log, whole));
    if (kind === "main") tables.push([ends(along)]); // all charts of the run are as long as the run
    const data = uPlot.join(tables, tables.map(() => [0, 2])); // 2: a gap reaches to the next point of its own line
    const tick = { stroke: colour("line"), width: 1, size: 5 }, grid = { stroke: colour("grid"), width: 1 };
    const font = "11.5px system-ui,sans-serif";
    const inTime = along === "times_s";
    const chart = new uPlot({
      width: Math.max(240, element.clientWidth),
      height: element.classList.contains("tall") ? (innerWidth < 760 ? 250 : 320) : 190,
      cursor: { drag: { x: true, y: false, uni: 20 }, focus: { prox: 24 }, points: { size: 7 },
        sync: kind === "main" ? { key: "run", setSeries: false } : undefined },
      focus: { alpha: 0.35 },
      legend: { live: true },
      scales: { x: { time: false }, y: { distr: panel.log ? 3 : 1 } },
      axes: [
        { stroke: colour("soft"), grid, ticks: tick, font, size: 34,
          values: (_, all) => all.map((value) => (inTime ? span(value) : short(value))) },
        { stroke: colour("soft"), grid, ticks: tick, font, size: 58,
          values: (_, all) => all.map((value) => (value === null ? "" : short(value))) },
      ],
      series: [
        { label: xs || (inTime ? "time" : "step"),
          value: (_, value) => (value === null ? "–" : inTime ? span(value) : Math.round(value).toLocaleString("en")) },
        ...found.map((line) => ({
          label: line.name, spanGaps: false, ...(line.shadow ? { class: "shadow" } : {}),
          ...(panel.key === "clip_factor" ? { paths: () => null } : {}), // not every update is clipped
          stroke: line.lost ? faded(colour(line.base), 0.55) : colour(line.base),
          width: line.lost ? 1 : 1.4, dash: line.dash ? [5, 3] : undefined,
          points: { show: (u, _, from, to) => panel.key === "clip_factor" || line.curves.every((one) => one.steps.length < (line.lost ? 4 : 30)), size: 4, fill: colour("card") },
          value: (_, value) => shown(value),
        })),
      ],
      hooks: {
        // What was rolled back of a group is shown and hidden with the rest of it.
        setSeries: [(u, place, options) => {
          if (place === null || options.show === undefined) return;
          found.forEach((line, i) => {
            const follows = line.shadow && line.shadow === found[place - 1].name && i !== place - 1;
            if (follows && u.series[i + 1].show !== options.show) u.setSeries(i + 1, { show: options.show });
          });
        }],
        drawClear: [(u) => marks(u, kind)],
        setScale: [(u, scale) => {
          if (scale !== "x") return;
          [element.dataset.from, element.dataset.to] = [u.scales.x.min, u.scales.x.max];
          if (kind === "main") follow(u);
        }] },
    }, data, element);
    chart.root.setAttribute("role", "img");
    chart.root.setAttribute("aria-label", `${title}: ${found.map((line) => line.name).join(", ")}`);
    made.set(element, chart);
  }

  // A zoom into one chart of the run is a zoom into all.
  let following = false;
  function follow(from) {
    if (following || from.status !== 1) return;
    following = true;
    const { min, max } = from.scales.x;
    for (const [element, chart] of made)
      if (chart !== from && element.drawing.kind === "main") chart.setScale("x", { min, max });
    following = false;
  }

  function plan(element) {
    const [where, a, b] = element.dataset.chart.split("/");
    if (where === "panel") {
      const panel = facts.panels[Number(a)];
      return { panel, kind: "main", title: panel.title };
    }
    if (where === "box") {
      const incident = facts.incidents[Number(a)], panel = incident.box[Number(b)];
      return { panel, kind: incident.onset_step, title: `${panel.title} before incident ${incident.id}` };
    }
    if (where === "branches") {
      const incident = facts.incidents[Number(a)], panel = incident.branches;
      return { panel, kind: "", title: `Branches of incident ${incident.id}`, xs: "position in the data" };
    }
    const trend = facts.trend;
    const names = { spikes_loss: "spikes of the loss", spikes_grad_norm: "spikes of the gradient norm",
      clipped: "clipped", skipped: "not applied" };
    const series = b.split("+").map((key) => ({ name: names[key],
      curves: [{ attempt: 1, survives: true, steps: trend.steps.map((_, i) => i + 1), times_s: [], values: trend[key] }] }));
    return { panel: { title: "Trend", log: false, series }, kind: "", title: "Shares of updates", xs: "part of the run" };
  }

  const charts = [...document.querySelectorAll("[data-chart]")];
  for (const element of charts) element.drawing = plan(element);
  const visible = (element) => !element.closest("details:not([open])");
  const drawAll = () => charts.filter(visible).forEach(draw);

  for (const button of document.querySelectorAll("button[data-axis]"))
    button.addEventListener("click", () => {
      axis = button.dataset.axis;
      for (const one of document.querySelectorAll("button[data-axis]"))
        one.setAttribute("aria-pressed", String(one.dataset.axis === axis));
      charts.filter((element) => element.drawing.kind === "main" && visible(element)).forEach(draw);
    });
  for (const details of document.querySelectorAll("details"))
    details.addEventListener("toggle", () => {
      if (details.open) charts.filter((element) => details.contains(element) && !made.has(element)).forEach(draw);
    });

  let width = innerWidth, waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(drawAll);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  // On paper everything is open, light and as wide as the page.
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details.print")) details.open = true;
    drawAll();
  });
  matchMedia("print").addEventListener("change", drawAll);
  drawAll();
  document.documentElement.dataset.ready = "true";
})();
