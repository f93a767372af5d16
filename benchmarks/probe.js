// Looks at the page in the first frame and leaves what it saw, as JSON, in the attribute data-seen of its own body:
// the height of the page, faults in words, tables that have to be scrolled, sliders that move.
"use strict";

const SMALLEST = 10, SLACK = 1.5, AA = 4.5, AA_LARGE = 3;  // pixels, pixels, and WCAG 2.2's contrast ratios

document.querySelector("iframe").addEventListener("load", async ({target}) => {
  const page = target.contentDocument, view = target.contentWindow;
  const height = page.documentElement.scrollHeight;
  page.querySelectorAll("details").forEach(one => { one.open = true; });
  // Words of a drawing take their final size a moment after the drawing has.
  await page.fonts.ready;
  await new Promise(done => setTimeout(done, 100));
  const faults = [...overflow(page, view), ...empty(page), ...sizeless(page), ...texts(page, view), ...drawings(page)];
  const scrolled = [...page.querySelectorAll(".scroll, pre")].filter(one => one.scrollWidth > one.clientWidth + 1).map(named);
  const seen = {height, width: view.innerWidth, faults: [...new Set(faults)], scrolled, sliders: sliders(page, view)};
  seen.dark = view.matchMedia("(prefers-color-scheme: dark)").matches;
  // Pictures that others lie on, once sliders stand at their beginning.
  seen.hidden = [...page.querySelectorAll(".shot")].filter(shot => covered(shot, page)).map(named);
  document.body.setAttribute("data-seen", JSON.stringify(seen));
});

function named(element) {
  const words = element.textContent.trim().replace(/\s+/g, " ").slice(0, 40);
  return `<${element.tagName.toLowerCase()} class="${element.getAttribute("class") ?? ""}"> ${words}`;
}

function scroller(element) {
  return element.parentElement?.closest(".scroll, pre");
}

function overflow(page, view) {
  const width = page.documentElement.clientWidth, found = [];
  if (page.documentElement.scrollWidth > width) found.push(`the page is ${page.documentElement.scrollWidth} px wide in ${width}`);
  for (const element of page.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (box.width && !scroller(element) && (box.right > width + SLACK || box.left < -SLACK)) {
      found.push(`outside the page: ${named(element)}`);
    }
    const style = view.getComputedStyle(element);
    if (style.overflowX !== "visible" && !element.matches(".scroll, pre") && element.scrollWidth > element.clientWidth + SLACK) {
      found.push(`cut off: ${named(element)}`);
    }
  }
  return found;
}

function empty(page) {
  const found = [];
  for (const one of page.querySelectorAll("section, aside, figure, .tile, .plots > *, .legend, table, h1, h2, h3, p, pre, dd, summary")) {
    const rest = one.cloneNode(true);
    if (one.matches("section, aside")) rest.querySelectorAll("h2, h3, .note").forEach(part => part.remove());
    if (!rest.textContent.trim() && !rest.querySelector("img, svg, i")) found.push(`empty: ${named(one)}`);
  }
  for (const table of page.querySelectorAll("table")) if (!table.tBodies[0]?.rows.length) found.push(`no rows: ${named(table)}`);
  return found;
}

function sizeless(page) {
  const found = [];
  for (const one of page.querySelectorAll("img, svg, section, figure, .track, .program")) {
    const box = one.getBoundingClientRect();
    if (box.width < 4 || box.height < 4) found.push(`no size: ${named(one)}`);
  }
  for (const image of page.querySelectorAll("img")) if (!image.naturalWidth) found.push(`not a picture: ${image.alt}`);
  for (const bar of page.querySelectorAll(".track")) if (!bar.querySelector("i")) found.push(`no bar: ${named(bar)}`);
  return found;
}

function texts(page, view) {
  const found = [], walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest("title, script, style")) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (!box.width || view.getComputedStyle(parent).visibility !== "visible") { found.push(`not shown: ${named(parent)}`); continue; }
    for (let one = parent; one && one !== page.documentElement; one = one.parentElement) {
      if (view.getComputedStyle(one).overflowX !== "hidden" && !(one instanceof view.SVGSVGElement)) continue;
      const edge = one.getBoundingClientRect();
      if (box.left < edge.left - SLACK || box.right > edge.right + SLACK || box.top < edge.top - SLACK || box.bottom > edge.bottom + SLACK) {
        found.push(`text is cut: ${named(parent)}`);
      }
    }
    const style = view.getComputedStyle(parent), drawn = parent.closest("svg");
    const size = parseFloat(style.fontSize) * (drawn ? drawn.getBoundingClientRect().width / drawn.viewBox.baseVal.width : 1);
    if (size < SMALLEST) found.push(`letters of ${size.toFixed(1)} px: ${named(parent)}`);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 600);
    const ratio = contrast(colour(drawn ? style.fill : style.color), background(parent, view));
    if (ratio < (large ? AA_LARGE : AA)) found.push(`contrast ${ratio.toFixed(2)}: ${named(parent)}`);
  }
  return found;
}

// Words of one drawing that stand on each other.
function drawings(page) {
  const found = [];
  for (const drawing of page.querySelectorAll("svg")) {
    const boxes = [...drawing.querySelectorAll("text")].map(text => [text, text.getBoundingClientRect()]);
    boxes.forEach(([a, one], index) => boxes.slice(index + 1).forEach(([b, other]) => {
      const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
      const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
      // A line box is taller than its letters.
      if (across > 1 && down > 0.3 * Math.min(one.height, other.height)) found.push(`'${a.textContent}' stands on '${b.textContent}'`);
    }));
  }
  return found;
}

function sliders(page, view) {
  return [...page.querySelectorAll(".slider")].filter(slider => {
    const shown = () => view.getComputedStyle(slider.querySelector(".right")).clipPath, before = shown();
    const input = slider.querySelector("input");
    input.value = 20;
    input.dispatchEvent(new view.Event("input", {bubbles: true}));
    return before !== shown();
  }).length;
}

function covered(shot, page) {
  shot.scrollIntoView();
  const box = shot.getBoundingClientRect();
  return page.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2)?.closest(".shot") !== shot;
}

function colour(text) {
  const [red, green, blue, alpha = 1] = text.match(/[\d.]+/g).map(Number);
  return {channels: [red, green, blue], alpha};
}

function background(element, view) {
  for (let one = element; one; one = one.parentElement) {
    const {channels, alpha} = colour(view.getComputedStyle(one).backgroundColor);
    if (alpha > 0.5) return {channels};
  }
  return {channels: [255, 255, 255]};
}

function contrast(a, b) {
  const [dark, light] = [a, b].map(({channels}) => {
    const [red, green, blue] = channels.map(value => value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  }).sort((x, y) => x - y);
  return (light + 0.05) / (dark + 0.05);
}
