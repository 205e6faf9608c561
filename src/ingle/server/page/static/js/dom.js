// Elements, made in one call. Texts become text nodes, never markup.

export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'value' || name === 'checked' || name === 'indeterminate') element[name] = value;
    else element.setAttribute(name === 'className' ? 'class' : name, value === true ? '' : value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false),
  );
  return element;
}

const SVG = 'http://www.w3.org/2000/svg';

// Drawn on a grid of 24, with strokes; what each stands for is said by the label of its button.
const PATHS = {
  add: 'M12 5v14M5 12h14',
  attach: 'M4 20h16M12 16V4M7 9l5-5 5 5',
  book: 'M5 4h11a3 3 0 0 1 3 3v13H8a3 3 0 0 1-3-3zM5 17a3 3 0 0 1 3-3h11',
  check: 'M5 12.5l4.5 4.5L19 7.5',
  close: 'M6 6l12 12M18 6L6 18',
  compare: 'M4 5h6.5v14H4zM13.5 5H20v14h-6.5z',
  copy: 'M9 9h10v11H9zM15 9V4H5v11h4',
  down: 'M12 5v14M6 13l6 6 6-6',
  edit: 'M4 20l1-4.5L16.5 4 20 7.5 8.5 19zM14 6.5l3.5 3.5',
  gear: 'M12 8.5a3.5 3.5 0 1 0 0 7 3.5 3.5 0 1 0 0-7M12 3v2.5M12 18.5V21M3 12h2.5M18.5 12H21M5.6 5.6l1.8 1.8M16.6 16.6l1.8 1.8M5.6 18.4l1.8-1.8M16.6 7.4l1.8-1.8',
  keys: 'M3 7h18v10H3zM7 10.5h.01M11 10.5h.01M15 10.5h.01M8 13.5h8',
  left: 'M14.5 6L8.5 12l6 6',
  menu: 'M4 7h16M4 12h16M4 17h16',
  more: 'M5.5 12h.01M12 12h.01M18.5 12h.01',
  onward: 'M5 6l6 6-6 6M13 6l6 6-6 6',
  pulse: 'M3 12h4l3-7 4 14 3-7h4',
  right: 'M9.5 6l6 6-6 6',
  search: 'M10.5 4.5a6 6 0 1 0 0 12 6 6 0 1 0 0-12M15 15l5 5',
  send: 'M12 19V5M6 11l6-6 6 6',
  sliders: 'M4 8h9M17 8h3M4 16h3M11 16h9M15 5.5v5M9 13.5v5',
  stop: 'M7.5 7.5h9v9h-9z',
  trash: 'M5 7h14M10 7V4.5h4V7M7 7l1 13h8l1-13',
  turn: 'M19 12a7 7 0 1 1-2.2-5.1M19 4v4.5h-4.5',
};

export function icon(name) {
  const svg = document.createElementNS(SVG, 'svg');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  svg.setAttribute('class', `icon icon-${name}`);
  const path = document.createElementNS(SVG, 'path');
  path.setAttribute('d', PATHS[name]);
  svg.append(path);
  return svg;
}

export function iconButton(name, label, onclick, properties = {}) {
  return h(
    'button',
    { type: 'button', class: 'icon-button', 'aria-label': label, title: label, onclick, ...properties },
    icon(name),
  );
}

// A list of actions that opens below its button, and closes on Escape, or when something else is chosen.
export function menuButton(label, items, properties = {}) {
  const menu = h('div', { popover: 'auto', class: 'menu', role: 'menu' });
  const button = iconButton('more', label, () => menu.togglePopover(), { 'aria-haspopup': 'menu', ...properties });
  const close = () => {
    menu.hidePopover();
    button.focus();
  };
  menu.addEventListener('toggle', (event) => {
    const opened = event.newState === 'open';
    button.setAttribute('aria-expanded', String(opened));
    if (!opened) return;
    menu.replaceChildren(
      ...items().map(([text, act]) =>
        h(
          'button',
          {
            type: 'button',
            role: 'menuitem',
            onclick: () => {
              close();
              act();
            },
          },
          text,
        ),
      ),
    );
    const { left, right, bottom } = button.getBoundingClientRect();
    const { offsetWidth, offsetHeight } = menu;
    menu.style.left = `${Math.max(8, Math.min(left, innerWidth - offsetWidth - 8, right))}px`;
    menu.style.top = `${Math.max(8, Math.min(bottom + 4, innerHeight - offsetHeight - 8))}px`;
    menu.firstElementChild?.focus();
  });
  menu.addEventListener('keydown', (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const all = [...menu.children];
    all[(all.indexOf(document.activeElement) + step + all.length) % all.length].focus();
  });
  return h('span', { class: 'menu-holder' }, button, menu);
}

// A modal dialog that goes when it is closed; Escape and a click beside it close it.
export function dialog(title, content, { className = '', closeLabel }) {
  const id = `title-${Math.random().toString(36).slice(2)}`;
  const close = () => shown.close();
  const head = h('header', {}, h('h2', { id }, title), iconButton('close', closeLabel, close));
  const shown = h('dialog', { class: className, 'aria-labelledby': id }, head, content);
  shown.addEventListener('click', (event) => {
    if (event.target === shown) close();
  });
  shown.addEventListener('close', () => shown.remove());
  document.body.append(shown);
  shown.showModal();
  return shown;
}
