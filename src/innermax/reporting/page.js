"use strict";
(() => {
  const pageSize = 24;
  const form = document.querySelector(".filters");
  const open = [];
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details:not([open])").forEach((one) => { one.open = true; open.push(one); });
  });
  addEventListener("afterprint", () => { open.splice(0).forEach((one) => { one.open = false; }); });
  if (!form) return;
  const cards = [...document.querySelectorAll(".card")];
  const output = form.querySelector("output");
  const buttons = [...form.querySelectorAll("button")];
  let first = 0;

  const fits = (card, name, value) =>
    value === "" || (value === "unconverged" && name === "outcome" ? "unconverged" in card.dataset : card.dataset[name] === value);

  const show = () => {
    const asked = [...form.querySelectorAll("select")].map((one) => [one.name, one.value]);
    const found = cards.filter((card) => asked.every(([name, value]) => fits(card, name, value)));
    first = Math.max(0, Math.min(first, Math.floor((found.length - 1) / pageSize) * pageSize));
    const shown = new Set(found.slice(first, first + pageSize));
    cards.forEach((card) => { card.hidden = !shown.has(card); });
    output.textContent = found.length ? `${first + 1}–${first + shown.size} of ${found.length}` : "none";
    buttons[0].disabled = first === 0;
    buttons[1].disabled = first + pageSize >= found.length;
  };

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", () => { first = 0; show(); });
  buttons.forEach((button) => button.addEventListener("click", () => {
    first += pageSize * Number(button.dataset.turn);
    show();
    if (button.disabled) buttons.find((other) => !other.disabled)?.focus(); // whoever turns pages by keyboard stays there
  }));
  form.reset();
  form.hidden = false;
  show();
})();
