/* Questions of `book/_ext/selftest.py`: show the reason for what was chosen, and keep the score of a page that has one.

Arrow keys choose among radio buttons on their way, so a choice counts when it is checked: by the button, or by Enter.
What is shown is copied from the list of answers below the question, as nodes. */
"use strict";

(() => {
  const forms = [...document.querySelectorAll("form.selftest")];
  const board = document.querySelector(".selftest-score");
  const first = new Map(); // form -> whether its first try was right

  const paragraph = (text) => {
    const p = document.createElement("p");
    p.textContent = text;
    return p;
  };

  function check(form) {
    const inputs = [...form.querySelectorAll("input")];
    const chosen = inputs.filter((i) => i.checked);
    const reason = (i) => form.querySelector(`.selftest-answers li[data-letter="${i.value}"]`);
    const isRight = (i) => reason(i).classList.contains("selftest-right");
    const verdict = form.querySelector(".selftest-verdict");
    if (!chosen.length) {
      verdict.className = "selftest-verdict";
      verdict.replaceChildren(paragraph(form.dataset.none));
      return;
    }
    const wrong = chosen.filter((i) => !isRight(i));
    const whole = !wrong.length && chosen.length === inputs.filter(isRight).length;
    if (!first.has(form)) first.set(form, whole);
    const shown = chosen.map((i) => {
      const box = document.createElement("div");
      box.className = reason(i).className;
      if (chosen.length > 1) {
        const letter = document.createElement("span");
        letter.textContent = `${i.value}. `;
        box.append(letter);
      }
      box.append(...[...reason(i).childNodes].map((n) => n.cloneNode(true)));
      for (const e of box.querySelectorAll("[id]")) e.removeAttribute("id");
      return box;
    });
    if (!whole && !wrong.length) shown.push(paragraph(form.dataset.more));
    verdict.className = `selftest-verdict ${whole ? "is-right" : wrong.length ? "is-wrong" : "is-open"}`;
    verdict.replaceChildren(...shown);
    count();
  }

  function count() {
    if (!board) return;
    const right = [...first.values()].filter(Boolean).length;
    const filled = (text) => text
      .replace("{right}", right)
      .replace("{all}", forms.length)
      .replace("{left}", forms.length - first.size);
    const over = first.size === forms.length;
    board.querySelector(".selftest-count").textContent = over ? "" : filled(board.dataset.score);
    board.querySelector(".selftest-end").textContent = over ? filled(board.dataset.end) : "";
  }

  function clear(form) {
    form.reset();
    const verdict = form.querySelector(".selftest-verdict");
    verdict.className = "selftest-verdict";
    verdict.replaceChildren();
    form.querySelector("details").open = false;
  }

  for (const form of forms) {
    const button = form.querySelector("button");
    button.disabled = button.hidden = false;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      check(form);
    });
  }
  if (board) {
    board.hidden = false;
    board.querySelector("button").addEventListener("click", () => {
      first.clear();
      forms.forEach(clear);
      count();
      if (forms.length) forms[0].querySelector("input").focus();
    });
    count();
  }

  /* On paper the answers are open. */
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll(".selftest-answers:not([open])")];
    for (const e of closed) e.open = true;
  });
  addEventListener("afterprint", () => {
    for (const e of closed) e.open = false;
  });
})();
