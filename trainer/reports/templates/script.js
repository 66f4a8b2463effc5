"use strict";
for (const button of document.querySelectorAll("[data-copy]")) {
  const text = document.getElementById(button.dataset.copy);
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
      button.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
for (const leaves of document.querySelectorAll(".leaves")) {
  const pages = [...leaves.children];
  if (pages.length < 2) continue;
  let now = 0;
  const bar = document.createElement("div");
  const place = document.createElement("span");
  const turn = (step) => {
    now = Math.min(Math.max(now + step, 0), pages.length - 1);
    pages.forEach((page, number) => page.classList.toggle("now", number === now));
    place.textContent = `${now + 1} of ${pages.length}`;
    back.disabled = now === 0;
    next.disabled = now === pages.length - 1;
  };
  const button = (label, step) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = label;
    made.addEventListener("click", () => turn(step));
    return made;
  };
  const back = button("← Previous", -1);
  const next = button("Next →", 1);
  bar.className = "turner";
  place.setAttribute("aria-live", "polite");
  bar.append(back, place, next);
  leaves.before(bar);
  leaves.classList.add("turned");
  leaves.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) {
      event.preventDefault();
      turn(step);
    }
  });
  turn(0);
}
