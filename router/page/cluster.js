// The live picture: every second the whole cluster as one router sees it.
import { get, keys, Refused } from "./api.js";
import { quantile, spark, sparkElement } from "./chart.js";
import { $, count, duration, make } from "./dom.js";

const PERIOD_MS = 1000;
const WINDOW = 30; // readings that a quantile looks back on
const LENGTH = 90; // points of a chart
const POOL = ["running", "parked", "cached", "free"];
const UNCACHED = { recomputed: "recomputed", streamed: "streamed", host: "away", dropped: "away" };

const readings = new Map(); // model -> [{at, model}], oldest first
const points = new Map(); // model and metric -> [{p50, p99}]
const cards = new Map();
const rows = new Map();

function card(key, title) {
  if (!cards.has(key)) {
    const note = make("span", { className: "muted" });
    const heading = make("h2", {}, title, note);
    const figure = make("p", { className: "figure" });
    const chart = sparkElement(title);
    const element = make("article", { className: "card" }, heading, figure, chart);
    $("slos").append(element);
    cards.set(key, { element, note, figure, chart });
  }
  return cards.get(key);
}

function drawLatency(model, name, title, slo, several) {
  const all = readings.get(model.name);
  const now = all[all.length - 1].model[name];
  const before = all[Math.max(0, all.length - 1 - WINDOW)].model[name].counts;
  const first = all.length === 1 ? now.counts.map(() => 0) : before;
  const point = { p50: quantile(now.bounds, now.counts, first, 0.5), p99: quantile(now.bounds, now.counts, first, 0.99) };
  const key = `${model.name} ${name}`;
  const line = points.get(key) || [];
  line.push(point);
  if (line.length > LENGTH) line.shift();
  points.set(key, line);
  const { note, figure, chart } = card(key, several ? `${title}, ${model.name}` : title);
  note.textContent = slo === null ? "" : `SLO ${duration(slo)}`;
  figure.classList.toggle("late", slo !== null && point.p50 !== null && point.p50 > slo);
  figure.replaceChildren(duration(point.p50), make("small", { text: `p99 ${duration(point.p99)}` }));
  chart.setAttribute("aria-label", `${title}: median ${duration(point.p50)}, p99 ${duration(point.p99)}`);
  spark(chart, line, slo, LENGTH);
}

function drawThroughput(model, several) {
  const all = readings.get(model.name);
  const [last, now] = [all[Math.max(0, all.length - 6)], all[all.length - 1]];
  const seconds = (now.at - last.at) / 1000;
  const grown = Math.max(0, now.model.counters.generation_tokens - last.model.counters.generation_tokens);
  const rate = seconds > 0 ? grown / seconds : 0;
  const key = `${model.name} rate`;
  const line = points.get(key) || [];
  line.push({ p50: rate, p99: null });
  if (line.length > LENGTH) line.shift();
  points.set(key, line);
  const { note, figure, chart } = card(key, several ? `Output, ${model.name}` : "Output");
  const kept = model.attainment.request;
  note.textContent = kept === undefined ? "" : `${Math.round(100 * kept)} % in SLO`;
  figure.replaceChildren(count(rate), make("small", { text: "tokens/s" }));
  chart.setAttribute("aria-label", `Output: ${count(rate)} tokens per second`);
  spark(chart, line, null, LENGTH);
}

function number(label, value) {
  return make("span", {}, `${label} `, make("b", { text: String(value) }));
}

function segments(bar, parts, total) {
  parts.forEach(([className, tokens], i) => {
    const part = bar.children[i] || bar.appendChild(make("span"));
    part.className = className;
    part.style.width = `${(100 * tokens) / Math.max(1, total)}%`;
  });
}

function drawWorker(worker, several) {
  if (!rows.has(worker.key)) {
    const made = { name: make("p", { className: "name" }), numbers: make("p", { className: "numbers" }) };
    made.pool = make("div", { className: "bar", role: "img" });
    made.thin = make("div", { className: "bar thin", role: "img" });
    made.element = make("li", { className: "worker" }, made.name, made.pool, made.thin, made.numbers);
    rows.set(worker.key, made);
  }
  const { element, name, pool, thin, numbers } = rows.get(worker.key);
  const total = worker.pool_tokens;
  const where = [several ? worker.model : null, worker.device, worker.tp > 1 ? `TP ${worker.tp}` : null];
  name.replaceChildren(
    make("b", { text: worker.id }),
    make("span", { className: `state ${worker.state}`, text: worker.state }),
    where.filter(Boolean).join(" · "),
    make(
      "span",
      { className: "load" },
      "requests",
      number("running", worker.num_running),
      number("waiting", worker.num_waiting),
      number("parked", worker.num_parked),
      number("step", duration(worker.step_s || null)),
    ),
  );
  segments(pool, POOL.map((state) => [state, worker.kv[state]]), total);
  const said = POOL.map((state) => `${state} ${count(worker.kv[state])}`).join(", ");
  pool.setAttribute("aria-label", `KV memory of ${worker.id}: ${said} of ${count(total)} tokens`);
  const without = Object.entries(UNCACHED).map(([what, className]) => [className, worker.uncached[what]]);
  segments(thin, without, Math.max(total, without.reduce((sum, [, tokens]) => sum + tokens, 0)));
  const gone = Object.keys(UNCACHED).map((what) => `${what} ${count(worker.uncached[what])}`).join(", ");
  thin.setAttribute("aria-label", `Context without KV: ${gone} tokens`);
  numbers.replaceChildren(
    "tokens",
    ...POOL.map((state) => number(state, count(worker.kv[state]))),
    ...Object.keys(UNCACHED)
      .filter((what) => worker.uncached[what] > 0)
      .map((what) => number(what, count(worker.uncached[what]))),
  );
  return element;
}

function draw(view) {
  const several = view.models.length > 1;
  for (const model of view.models) {
    const all = readings.get(model.name) || [];
    const last = all[all.length - 1];
    // Another router, or one that was restarted without a controller: start over.
    if (last && model.counters.finished < last.model.counters.finished) all.length = 0;
    all.push({ at: performance.now(), model });
    if (all.length > WINDOW + 1) all.shift();
    readings.set(model.name, all);
    drawLatency(model, "ttft", "First token", model.ttft_slo_s, several);
    drawLatency(model, "tpot", "Per token", model.tpot_slo_s, several);
    drawThroughput(model, several);
  }
  $("workers").replaceChildren(...view.workers.map((worker) => drawWorker(worker, several)));
  const present = new Set(view.workers.map((worker) => worker.key));
  for (const key of rows.keys()) if (!present.has(key)) rows.delete(key);
  const plural = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
  $("summary").textContent =
    `${plural(view.workers.length, "worker")}, ${plural(view.num_routers, "router")}` +
    (view.complete ? "" : " (this router's view)");
}

function lock(message, openKeys) {
  const button = make("button", { type: "button", className: "link", text: "Enter keys" });
  button.addEventListener("click", openKeys);
  $("locked").replaceChildren(message + " ", ...(openKeys ? [button] : []));
  $("locked").hidden = false;
}

export function watch(openKeys) {
  let refused = null; // the admin key that the server did not take
  async function tick() {
    const key = keys.admin.get();
    if (document.hidden || refused === key) return;
    try {
      draw(await get("admin/cluster", key));
      $("live").hidden = false;
      $("locked").hidden = true;
      refused = null;
    } catch (error) {
      $("live").hidden = true;
      if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
        refused = key;
        const wrong = error.status === 403 ? "This server shows its cluster to nobody: it has no admin key." : "";
        lock(wrong || (key ? "This is not the admin key." : "What the cluster does is shown with the admin key."), wrong ? null : openKeys);
      } else {
        lock("The server does not answer; trying again.", null);
      }
    }
  }
  const forever = async () => {
    await tick();
    setTimeout(forever, PERIOD_MS);
  };
  forever();
}
