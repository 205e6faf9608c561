// What markup may be: no more than a text needs, without scripts, styles, forms, pictures from elsewhere, and with
// links that open apart and tell nobody where they were clicked.

import DOMPurify from '../vendor/dompurify/purify.es.mjs';

const ALLOWED = {
  ALLOWED_TAGS: [
    ...[
      'a',
      'blockquote',
      'br',
      'code',
      'del',
      'details',
      'em',
      'h2',
      'h3',
      'h4',
      'h5',
      'h6',
      'hr',
      'kbd',
      'li',
      'ol',
      'p',
      'pre',
    ],
    ...['span', 'strong', 'sub', 'summary', 'sup', 'table', 'tbody', 'td', 'th', 'thead', 'tr', 'u', 'ul'],
  ],
  ALLOWED_ATTR: ['align', 'class', 'data-display', 'href', 'start', 'title'],
  ADD_URI_SAFE_ATTR: ['align', 'data-display', 'start'], // whose values are no addresses
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const purifier = DOMPurify();
purifier.addHook('afterSanitizeAttributes', (node) => {
  if (node.tagName !== 'A') return;
  node.setAttribute('target', '_blank');
  node.setAttribute('rel', 'noopener noreferrer nofollow');
});

export function sanitized(html, options = {}) {
  return purifier.sanitize(html, { ...ALLOWED, ...options });
}
