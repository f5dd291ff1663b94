"use strict";

// Everything works without this script, except the live updates.

const every_ms = 3000;

function keepUpToDate(region) {
  const words = document.querySelector("[data-live-words]");
  const said = document.querySelector("[data-live-said]");
  const button = document.querySelector("[data-live-switch]");
  let timer = null;
  let title = titleOf(region);

  function titleOf(part) {
    return part.querySelector("[data-live-title]")?.textContent ?? "";
  }

  async function update() {
    try {
      const answer = await fetch(region.dataset.live, { credentials: "same-origin" });
      if (answer.redirected) {
        location.reload(); // to the login page
        return;
      }
      if (!answer.ok) throw new Error(answer.statusText);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const focused = region.contains(document.activeElement) ? document.activeElement.id : "";
      region.replaceChildren(...page.body.childNodes);
      if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
      words.textContent = "Updates live";
      words.classList.remove("lost");
      // Only a change of the situation is read aloud, not every number.
      if (titleOf(region) !== title) said.textContent = title = titleOf(region);
    } catch {
      words.textContent = "No answer; these numbers are old";
      words.classList.add("lost");
    }
  }

  function start() {
    const isOn = button.getAttribute("aria-pressed") === "false" && !document.hidden;
    clearInterval(timer);
    timer = isOn ? setInterval(update, every_ms) : null;
    if (isOn) update();
  }

  button.addEventListener("click", () => {
    const isPaused = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!isPaused));
    words.textContent = isPaused ? "Updates live" : "Updates are paused";
    start();
  });
  document.addEventListener("visibilitychange", start);
  document.querySelector("[data-live-controls]").hidden = false;
  start();
}

function countSelected(form) {
  const all = form.querySelector("[data-all]");
  const boxes = [...form.querySelectorAll("input[name=row]")];
  const chosen = form.querySelector("[data-chosen]");
  const bySelection = form.querySelector("input[name=scope][value=selected]");

  function show() {
    const count = boxes.filter((box) => box.checked).length;
    chosen.textContent = `${count} selected`;
    all.checked = count > 0 && count === boxes.length;
    all.indeterminate = count > 0 && count < boxes.length;
  }

  all.closest("[hidden]").hidden = false;
  all.addEventListener("change", () => {
    for (const box of boxes) box.checked = all.checked;
    bySelection.checked = true;
    show();
  });
  for (const box of boxes) {
    box.addEventListener("change", () => {
      bySelection.checked = true;
      show();
    });
  }
  show();
}

for (const region of document.querySelectorAll("[data-live]")) keepUpToDate(region);
for (const form of document.querySelectorAll("[data-selection]")) countSelected(form);
