'use strict';
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const make = (tag, properties, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

/* The number that a cell shows, sizes and times in one unit each; '' for what was not measured. */
const UNITS = { k: 1e3, M: 1e6, G: 1e9, kB: 1e3, MB: 1e6, GB: 1e9 };
const ENDLESS = { exact: Infinity, inf: Infinity, '−inf': -Infinity };
function quantity(cell) {
  const text = cell.textContent.trim();
  const found = text.replaceAll(',', '').replace('−', '-').match(/^(?:(\d+) min )?(-?\d[\d.]*(?:e[+-]?\d+)?) ?(\w*)/);
  if (found) return 60 * (found[1] ?? 0) + found[2] * (UNITS[found[3]] ?? 1);
  return ENDLESS[text] ?? (text === '–' ? '' : text);
}

/* Every table: headings sort, and cells carry the heading that they show where the table is narrow. */
for (const table of all('table')) {
  const heads = table.tHead ? [...table.tHead.rows[0].cells] : [];
  for (const row of table.tBodies[0].rows) {
    heads.forEach((head, column) => {
      const cell = row.cells[column];
      cell.dataset.label = head.textContent.trim();
      cell.classList.toggle('none', cell.textContent.trim() === '–');
    });
  }
  heads.filter(head => 'sort' in head.dataset).forEach(head => {
    const button = make('button', { type: 'button', title: head.title || 'sort' }, ...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
      const isNumber = head.classList.contains('n');
      const key = row => {
        const cell = row.cells[head.cellIndex];
        return cell.dataset.key ?? (isNumber ? quantity(cell) : cell.textContent.trim());
      };
      const compare = (a, b) => {
        if (a === '' || b === '') return (a === '') - (b === '');  // not measured: last
        return down * (isNaN(a) || isNaN(b) ? `${a}`.localeCompare(b, 'en', { numeric: true }) : a - b || 0);
      };
      closeLayer();
      heads.forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', down === 1 ? 'ascending' : 'descending');
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => compare(key(a), key(b))));
    });
  });
}

/* The contents are open where they stand beside the page. */
const wide = matchMedia('(min-width: 1240px)');
const adapt = () => { document.getElementById('contents').open = wide.matches; };
wide.addEventListener('change', adapt);
adapt();

/* A table that scrolls can be reached with the keyboard. */
const reachable = () => {
  for (const box of all('.scroll')) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0; else box.removeAttribute('tabindex');
  }
};
addEventListener('resize', reachable);
addEventListener('toggle', reachable, true);
addEventListener('beforeprint', () => { for (const part of all('details')) part.open = true; });

/* The table of layers: a filter, and the distributions of a layer below its row. */
const FACTS = ['range', 'seen in calibration', 'grid', 'scale', 'zero point', 'signal over noise', 'clipped'];
const MANY = 30;
const layers = document.getElementById('layer-table');
const rows = layers ? [...layers.tBodies[0].rows] : [];
const filter = document.getElementById('filter');

function show() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = rows.filter(row => {
    const text = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
    return !row.hidden;
  });
  closeLayer();
  layers.classList.toggle('folded', !words.length && rows.length > MANY && !more.dataset.open);
  more.hidden = !layers.classList.contains('folded');
  document.getElementById('shown').textContent = `${found.length} of ${rows.length} layers`;
}

const svg = (tag, attributes, ...children) => {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  element.append(...children);
  return element;
};

/* Floats as an area, red beyond the range; codes as a line. Heights are digits of base 36. */
function histogram(title, densities, codes) {
  const floats = [...densities].map(digit => parseInt(digit, 36)), beyond = 4;
  const width = (floats.length - 2 * beyond) / codes.length;
  const bars = (keep) => floats.map((h, i) => (h && keep(i) ? `M${i} 37v${-h}h1v${h}z` : '')).join('');
  const inside = i => i >= beyond && i < floats.length - beyond;
  const line = [...codes].map(digit => `V${37 - parseInt(digit, 36)}h${width.toFixed(3)}`).join('');
  return svg('svg', { viewBox: `0 0 ${floats.length} 38`, preserveAspectRatio: 'none', class: 'histogram', role: 'img',
    'aria-label': `Histogram of the ${title}: float values, and codes. Range and clipped share are listed below.` },
    svg('path', { class: 'seen', d: bars(inside) }), svg('path', { class: 'cut', d: bars(i => !inside(i)) }),
    svg('path', { class: 'codes', d: `M${beyond} 37${line}V37` }));
}

function distribution([title, site, floats, codes, ...facts]) {
  const values = facts.map((fact, index) => FACTS[index] === 'grid' ? details.grids[fact] : fact);
  const list = make('dl', { className: 'rows' }, ...FACTS.map((name, index) =>
    make('div', {}, make('dt', { textContent: name }), make('dd', { textContent: values[index] }))));
  const ends = facts[0].split(' … ').map(textContent => make('span', { textContent }));
  return make('div', {}, make('h3', { textContent: title }), make('p', { className: 'mono dim', textContent: site }),
    ...(floats ? [histogram(title, floats, codes), make('div', { className: 'ends' }, ...ends)] : []), list);
}

let details = null;
function closeLayer() {
  document.getElementById('details')?.remove();
  for (const row of rows.filter(each => each.classList.contains('open'))) {
    row.classList.remove('open');
    row.querySelector('a').removeAttribute('aria-expanded');
  }
}

function openLayer(id) {
  const row = rows.find(each => each.id === id);
  if (!row) return;
  if (row.hidden || (layers.classList.contains('folded') && row.offsetParent === null)) {
    filter.value = ''; more.dataset.open = 'yes'; show();
  }
  closeLayer();
  details ??= JSON.parse(document.getElementById('layer-details').textContent);
  const [notes, sites] = details.layers[row.id.split('-')[1] - 1];
  const close = make('button', { type: 'button', className: 'plain', textContent: 'close' });
  close.addEventListener('click', () => { closeLayer(); row.querySelector('a').focus(); history.replaceState(null, '', '#layers'); });
  const cell = make('td', { colSpan: row.cells.length }, ...notes.map(textContent => make('p', { textContent })),
    make('div', { className: 'grid' }, ...sites.map(distribution)), close);
  row.classList.add('open');
  row.querySelector('a').setAttribute('aria-expanded', 'true');
  row.after(make('tr', { id: 'details' }, cell));
  row.scrollIntoView({ block: 'nearest' });
  row.querySelector('a').focus({ preventScroll: true });
}

/* The map of modules: every box is a module or a layer, as wide as its share. */
const SHARES = { macs: 3, bytes: 4, time: 5 };  // columns
function moduleTree() {
  const root = { name: '', path: '', parts: new Map() };
  for (const row of rows) {
    let at = root;
    const path = row.dataset.path.split('.').filter(Boolean);
    path.forEach((name, depth) => {
      if (!at.parts.has(name)) at.parts.set(name, { name, path: path.slice(0, depth + 1).join('.'), parts: new Map() });
      at = at.parts.get(name);
    });
    at.parts.set(`#${row.id}`, { name: row.dataset.op, path: row.dataset.path, row, parts: new Map() });
  }
  return root;
}

function measure(node, value) {  // sums, worst grades; a module of one part is that part
  const parts = [...node.parts.values()].map(part => measure(part, value));
  if (parts.length === 1 && node.path) {
    const [only] = parts;
    return { ...only, name: only.row && !only.own ? node.name : `${node.name}.${only.name}`, own: true };
  }
  const grades = node.row ? [node.row.dataset.grade] : parts.map(part => part.grade).filter(grade => grade !== '');
  return { ...node, parts, value: node.row ? value(node.row) : parts.reduce((sum, part) => sum + part.value, 0), grade: grades.sort()[0] ?? '' };
}

function drawMap() {
  const box = document.getElementById('map'), by = document.getElementById('map-by').value;
  const number = row => Number(quantity(row.cells[SHARES[by]])) || 0;
  const total = rows.reduce((sum, row) => sum + number(row), 0);
  const root = measure(moduleTree(), row => (total ? 0.8 * number(row) / total : 0) + (total ? 0.2 : 1) / rows.length);
  const share = node => node.row ? number(node.row) : node.parts.reduce((sum, part) => sum + share(part), 0);
  const drawn = [];
  const place = (node, left, depth, parent) => {
    const text = total ? `, ${(100 * share(node) / total).toFixed(1)} % of ${by}` : '';
    const button = make('button', { type: 'button', tabIndex: -1, className: `g${node.grade}`, textContent: node.name,
      title: `${node.path || node.name}${text}` });
    button.setAttribute('aria-label', `${node.path || 'root'}: ${node.name}${text}`);
    Object.assign(button.style, { left: `${100 * left}%`, width: `${100 * node.value}%`, top: `${depth * 26}px` });
    button.addEventListener('click', () => {
      if (node.row) { location.hash = node.row.id; openLayer(node.row.id); return; }
      filter.value = node.path; show(); filter.scrollIntoView({ block: 'center' });
    });
    const at = { button, parent, depth, children: [] };
    drawn.push(at);
    for (const part of node.parts) { at.children.push(place(part, left, depth + 1, at)); left += part.value; }
    return at;
  };
  let left = 0;
  for (const part of root.parts) { place(part, left, 0, null); left += part.value; }
  box.replaceChildren(...drawn.map(at => at.button));
  box.style.height = `${26 * (1 + Math.max(...drawn.map(at => at.depth)))}px`;
  box.style.minWidth = `${6 * rows.length}px`;
  drawn[0].button.tabIndex = 0;
  box.onkeydown = event => {
    const at = drawn.find(each => each.button === document.activeElement);
    const level = drawn.filter(each => each.depth === at?.depth), index = level.indexOf(at);
    const next = { ArrowRight: level[index + 1], ArrowLeft: level[index - 1], ArrowUp: at?.parent, ArrowDown: at?.children[0] }[event.key];
    if (!next) return;
    event.preventDefault();
    at.button.tabIndex = -1;
    next.button.tabIndex = 0;
    next.button.focus();
  };
}

const more = document.getElementById('more');
if (layers) {
  for (const hidden of all('.needs-script')) hidden.hidden = false;
  filter.addEventListener('input', show);
  more.addEventListener('click', () => { more.dataset.open = 'yes'; show(); });
  document.getElementById('map-by').addEventListener('change', drawMap);
  addEventListener('hashchange', () => openLayer(location.hash.slice(1)));
  addEventListener('beforeprint', () => layers.classList.remove('folded'));
  addEventListener('click', event => {  // the same link again opens the layer again
    const link = event.target.closest('a[href^="#layer-"]');
    if (link && link.hash === location.hash) openLayer(link.hash.slice(1));
  });
  show();
  drawMap();
  openLayer(location.hash.slice(1));
}
reachable();
