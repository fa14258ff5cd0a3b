"use strict";
(() => {
  const shots = [...document.querySelectorAll(".shot")];
  const bar = document.querySelector(".filters");
  const select = bar.querySelector("select");
  const buttons = [...bar.querySelectorAll("button[data-kind]")];
  const said = document.getElementById("shown");

  const wanted = (kind, labels) => {
    const kinds = buttons.filter((b) => b.getAttribute("aria-pressed") === "true").map((b) => b.dataset.kind);
    return (!kinds.length || kinds.includes(kind)) && (!select.value || labels.includes(select.value));
  };
  const active = () => select.value || buttons.some((b) => b.getAttribute("aria-pressed") === "true");
  const filter = () => {
    let count = 0;
    for (const shot of shots) {
      let hits = 0;
      for (const box of shot.querySelectorAll("[data-k]")) {
        const hit = wanted(box.dataset.k, box.dataset.l.split(" "));
        box.classList.toggle("dim", !hit);
        hits += hit;
      }
      shot.hidden = Boolean(active()) && !hits;
      count += !shot.hidden;
    }
    for (const group of document.querySelectorAll(".group")) group.hidden = !group.querySelector(".shot:not([hidden])");
    said.textContent = `${count} of ${shots.length} images`;
  };
  bar.hidden = false;
  select.addEventListener("change", filter);
  for (const button of buttons) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      filter();
    });
  }
  bar.querySelector("#reset").addEventListener("click", () => {
    select.value = "";
    for (const button of buttons) button.setAttribute("aria-pressed", "false");
    filter();
  });
  filter();

  const dialog = document.querySelector("dialog");
  const place = dialog.querySelector("div.large");
  let current = null;
  const show = (shot) => {
    current = shot;
    const copy = shot.cloneNode(true);
    copy.removeAttribute("id");
    copy.querySelector(".open").removeAttribute("href");
    place.replaceChildren(copy);
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  };
  const step = (by) => {
    const visible = shots.filter((shot) => !shot.hidden);
    show(visible[(visible.indexOf(current) + by + visible.length) % visible.length]);
  };
  for (const shot of shots) {
    shot.querySelector(".open").addEventListener("click", (event) => {
      event.preventDefault();
      show(shot);
    });
  }
  dialog.querySelector("#previous").addEventListener("click", () => step(-1));
  dialog.querySelector("#next").addEventListener("click", () => step(1));
  dialog.querySelector("#close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  dialog.addEventListener("close", () => {
    place.replaceChildren();
    if (current) current.querySelector(".open").focus();
  });

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort"); // at first names from A on, numbers from the largest on
        const up = before ? before === "descending" : head.classList.contains("name");
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => row.cells[column].textContent.trim();
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          const [m, n] = [parseFloat(x), parseFloat(y)];
          const order = head.classList.contains("name") ? y.localeCompare(x) : (isNaN(n) ? -Infinity : n) - (isNaN(m) ? -Infinity : m);
          return (up ? -1 : 1) * (order || 0);
        });
        table.tBodies[0].append(...rows);
      });
    });
  }
})();
