// Quantiles of what was observed between two readings of a histogram, and a small line chart of them.
import { svg } from "./dom.js";

// `now` and `before`: observations per bucket, not cumulated; the last bucket has no bound. null without any.
export function quantile(bounds, now, before, share) {
  const counts = now.map((n, i) => n - (before[i] || 0));
  const total = counts.reduce((sum, n) => sum + n, 0);
  if (total <= 0) return null;
  let below = 0;
  for (let i = 0; i < counts.length; i++) {
    if (counts[i] && below + counts[i] >= share * total) {
      const low = i ? bounds[i - 1] : 0;
      if (i >= bounds.length) return low;
      return low + ((share * total - below) / counts[i]) * (bounds[i] - low);
    }
    below += counts[i];
  }
  return bounds[bounds.length - 1];
}

const WIDTH = 200;
const HEIGHT = 44;

function path(values, top, length) {
  let d = "";
  values.forEach((value, i) => {
    if (value === null) return;
    const x = (WIDTH * (i + length - values.length)) / Math.max(1, length - 1);
    const y = HEIGHT - (HEIGHT * value) / top;
    d += `${d && values[i - 1] !== null ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
  });
  return d;
}

// `points`: {p50, p99} or nulls, oldest first; `slo` in seconds, or null.
export function spark(element, points, slo, length) {
  const highest = Math.max(0, ...points.map((point) => Math.max(point.p50 ?? 0, point.p99 ?? 0)));
  const top = Math.max(highest, (slo ?? 0) * 1.15, 1e-6) * 1.05;
  const parts = [
    svg("path", { class: "p99", d: path(points.map((p) => p.p99), top, length) }),
    svg("path", { class: "p50", d: path(points.map((p) => p.p50), top, length) }),
  ];
  if (slo !== null) {
    const y = (HEIGHT - (HEIGHT * slo) / top).toFixed(1);
    parts.unshift(svg("line", { class: "slo", x1: 0, x2: WIDTH, y1: y, y2: y }));
  }
  element.replaceChildren(...parts);
}

export function sparkElement(label) {
  return svg("svg", {
    class: "spark",
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": label,
  });
}
