// The page without this script does all that it does with it. The script keeps what is shown up to date: it fetches the
// main part again, swaps it, and leaves focus, open parts, and what somebody is typing alone.
"use strict";
(() => {
  const main = () => document.querySelector("main");
  const away = document.getElementById("away");
  let timer;

  const isBusy = () => document.hidden || main().querySelector("details[open]") || isField(document.activeElement);
  const isField = (element) => /^(INPUT|SELECT|TEXTAREA)$/.test(element?.tagName ?? "") && main().contains(element);

  function wait() {
    clearTimeout(timer);
    const seconds = Number(main().dataset.refresh);
    if (seconds) timer = setTimeout(refresh, seconds * 1000);
  }

  async function refresh() {
    if (!isBusy()) {
      const text = await part();
      away.hidden = text !== null;
      if (text !== null && !isBusy()) swap(text);
    }
    wait();
  }

  async function part() {
    try {
      const answer = await fetch(location.pathname + location.search.replace(/([?&])done=\w+/, "$1"), {
        headers: { "X-Fragment": "1" },
      });
      return answer.ok ? await answer.text() : null;
    } catch {
      return null;
    }
  }

  function swap(text) {
    const next = new DOMParser().parseFromString(text, "text/html").querySelector("main");
    if (!next) return;
    const held = document.activeElement;
    const kept = main().contains(held) ? held : null;
    main().replaceWith(document.adoptNode(next));
    if (kept) again(kept)?.focus({ preventScroll: true });
  }

  const again = (held) =>
    document.getElementById(held.id) ??
    [...main().querySelectorAll("a, button, summary")].find(
      (one) => one.tagName === held.tagName && one.getAttribute("href") === held.getAttribute("href"),
    );

  document.addEventListener("submit", ({ target, submitter }) => {
    if (target.method === "post") setTimeout(() => submitter && (submitter.disabled = true));
  });
  window.addEventListener("pageshow", () => {
    for (const button of document.querySelectorAll("button[disabled]")) button.disabled = false;
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") document.activeElement?.blur();
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "/") {
      event.preventDefault();
      document.getElementById("q").select();
    }
    if (event.key === "j" || event.key === "k") {
      const rows = [...main().querySelectorAll("a.row")];
      const at = rows.indexOf(document.activeElement);
      rows[Math.min(rows.length - 1, Math.max(0, at + (event.key === "j" ? 1 : -1)))]?.focus();
    }
  });
  document.addEventListener("visibilitychange", () => document.hidden || wait());
  wait();
})();
