// What the pointer is over: class and score of the result's pixel, beside the pointer, without asking the server.
//
// The body of a function that Gradio calls when the page is there, with `props`, whose value is what views.py's
// `describe_all_pixels` gives, or null, and `watch`, which says when it has changed. A mouse or pen hovers; for touch and
// keyboard there is the click.

const tip = document.createElement("div");
tip.id = "hover";
tip.hidden = true;
Object.assign(tip.style, {
    position: "fixed", zIndex: 10000, pointerEvents: "none", maxWidth: "40ch", padding: "2px 8px", borderRadius: "6px",
    font: "14px system-ui, sans-serif", background: "#222", color: "#fff", border: "1px solid #888",
    overflowWrap: "anywhere",
});
document.body.append(tip);

let grid = null;
let newest = 0;

watch("value", async () => {
    const number = ++newest, value = props.value;
    grid = null;
    tip.hidden = true;
    if (!value) return;
    const packed = Uint8Array.from(atob(value.pixels), (letter) => letter.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = new Uint8Array(await new Response(unpacked).arrayBuffer());
    if (number === newest) grid = {...value, bytes};
});

function textAt(image, x, y) {
    const area = image.getBoundingClientRect();
    // The picture is in the middle of its element, never enlarged.
    const scale = Math.min(area.width / image.naturalWidth, area.height / image.naturalHeight, 1);
    const column = Math.floor(((x - area.left - area.width / 2) / (scale * image.naturalWidth) + 0.5) * grid.width);
    const row = Math.floor(((y - area.top - area.height / 2) / (scale * image.naturalHeight) + 0.5) * grid.height);
    if (!(column >= 0 && column < grid.width && row >= 0 && row < grid.height)) return "";
    const size = grid.width * grid.height, pixel = row * grid.width + column;
    const [low, high, score] = [0, 1, 2].map((plane) => grid.bytes[plane * size + pixel]);
    return `${grid.names[low + 256 * high]}, score ${(score / 100).toFixed(2)}`;
}

document.addEventListener("pointermove", (event) => {
    const result = grid && event.pointerType !== "touch" && event.target.closest?.("#result");
    const image = result && result.querySelector("img");
    const text = image ? textAt(image, event.clientX, event.clientY) : "";
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text; // never HTML: names are what somebody typed
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4)}px`;
    tip.style.top = `${Math.max(event.clientY - tip.offsetHeight - 10, 4)}px`;
});
for (const type of ["scroll", "pointerdown", "pointerleave"]) {
    document.documentElement.addEventListener(type, () => { tip.hidden = true; }, true);
}
