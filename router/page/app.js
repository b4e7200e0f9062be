// Starts the page: colours, keys, health, and the two halves.
import { keys } from "./api.js";
import { loadModels, playground } from "./chat.js";
import { watch } from "./cluster.js";
import { $ } from "./dom.js";

const THEMES = { auto: "as the system has them", light: "light", dark: "dark" };

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme[0].toUpperCase() + theme.slice(1);
  $("theme").setAttribute("aria-label", `Colours: ${THEMES[theme]}`);
  localStorage.setItem("ellm-theme", theme);
}

function openKeys() {
  $("api-key").value = keys.api.get();
  $("admin-key").value = keys.admin.get();
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

async function showHealth() {
  let [ok, text] = [false, "not reachable"];
  try {
    const response = await fetch("health/ready", { cache: "no-store" });
    const body = await response.json();
    [ok, text] = [response.ok, response.ok ? "ready" : body.reason || body.status];
  } catch {
    // as above
  }
  $("health").className = `health ${ok ? "ok" : "bad"}`;
  if ($("health").lastElementChild.textContent !== text) $("health").lastElementChild.textContent = text;
}

async function tryModels() {
  try {
    await loadModels();
  } catch (error) {
    if (error.status === 401) openKeys();
    else setTimeout(tryModels, 2000);
  }
}

const themes = Object.keys(THEMES);
const saved = localStorage.getItem("ellm-theme");
setTheme(themes.includes(saved) ? saved : "auto");
$("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? "auto";
  setTheme(themes[(themes.indexOf(now) + 1) % themes.length]);
});
$("keys").addEventListener("click", openKeys);
$("key-dialog").addEventListener("close", () => {
  if ($("key-dialog").returnValue !== "save") return;
  keys.api.set($("api-key").value.trim());
  keys.admin.set($("admin-key").value.trim());
  tryModels();
});
playground(openKeys);
watch(openKeys);
tryModels();
showHealth();
setInterval(() => document.hidden || showHealth(), 3000);
$("prompt").focus({ preventScroll: true });
