// What became of one request, event by event.
import { get, keys } from "./api.js";
import { $, duration, make } from "./dom.js";

function events(choice) {
  return choice.events.map(({ at_s, event, detail }) =>
    make(
      "li",
      { className: event },
      make("time", { text: duration(at_s) }),
      make("i"),
      make("div", {}, make("b", { text: event.replaceAll("_", " ") }), make("span", { text: detail ? `  ${detail}` : "" })),
    ),
  );
}

export async function showTimeline(id) {
  $("timeline-id").textContent = id;
  try {
    const found = await get(`admin/requests/${encodeURIComponent(id)}`, keys.admin.get());
    const lists = found.choices.map((choice) => make("ul", { className: "events" }, ...events(choice)));
    $("timeline").replaceChildren(...lists);
  } catch (error) {
    $("timeline").replaceChildren(make("p", { className: "muted", text: error.message }));
  }
  if (!$("timeline-dialog").open) $("timeline-dialog").showModal();
}
