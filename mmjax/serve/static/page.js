// The page of mmjax.tools.serve. What it knows of a run it asks for (`ask`); a saved page has all answers with it.
'use strict'

const saved = JSON.parse(document.getElementById('saved')?.textContent ?? 'null')
const $ = id => document.getElementById(id)
const COLOURS = ['#1f77b4', '#e07b39', '#3a9a6b', '#b04a8f', '#8a7a2f', '#4aa3a8', '#c2453d', '#6f6fc4']
const FULL_NATS = 9 // surprise of the strongest colour

const state = {
  runs: [], text: '', reads: [], nexts: [], changes: [], // the last three by run
  compared: [], // changes that `nexts` are of
  stories: {}, // continuations by run and variant
  answers: {}, // all that was asked, for a saved page
  held: null, // {run, at}: the token whose reads are shown when nothing is pointed at
  row: null, // {run, row, layer}: shown instead of a token
  map: { run: 0, layer: null }, byChange: false,
  stop: null, sampling: null, // of the last continuations
  doing: 0, // how many things were begun: only the last says that it goes on or is done
}

// Elements: h('p.soft', {title: 'x', onclick: f, '--w': 3}, 'text', child)
function h(what, props, ...children) {
  const [tag, ...classes] = what.split('.')
  const element = document.createElement(tag)
  element.classList.add(...classes)
  for (const [name, value] of Object.entries(props ?? {})) {
    if (name.startsWith('--')) element.style.setProperty(name, value)
    else if (name.startsWith('on')) element.addEventListener(name.slice(2), value)
    else if (typeof value === 'boolean' && !name.startsWith('aria-')) element[name] = value
    else if (value != null) element.setAttribute(name, value)
  }
  return fill(element, ...children)
}

function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter(child => child != null))
  return element
}

// Fills a part of the page again; the keyboard stays in it.
function refill(id, ...children) {
  const place = $(id), inside = place.contains(document.activeElement)
  fill(place, ...children)
  if (inside) place.focus({ preventScroll: true })
}

const number = (value, digits = 2) => value == null ? '' : value.toLocaleString('en', { maximumFractionDigits: digits })
const percent = share => `${share >= 0.1 || !share ? (100 * share).toFixed(0) : (100 * share).toPrecision(2)}\u00a0%`
const visible = token => token.replaceAll('\n', '⏎').replaceAll('\t', '⇥').replace(/^ +| +$/g, s => '␣'.repeat(s.length))
  .replace(/[\u0000-\u001f\u007f-\u009f]/g, c => `\\x${c.charCodeAt(0).toString(16).padStart(2, '0')}`)
const bar = (share, kind = '') => h('span.fill' + kind, { '--w': Math.min(100, 100 * share) })

function say(sentence, isError = false) {
  $('status').textContent = sentence
  $('status').classList.toggle('error', isError)
}

function key(question, fields) {
  const { sampling, ...rest } = fields
  return `${question} ${JSON.stringify(rest)}`
}

async function ask(question, fields, signal) {
  if (saved) {
    const answer = saved.answers[key(question, fields)]
    if (answer === undefined) throw Error(question === 'stream' && fields.text === saved.text ? 'This page was saved without a continuation.' : 'This is a saved page: it has the answers for its own text alone.')
    return answer
  }
  const response = await fetch(`api/${question}`, {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(fields), signal,
  }).catch(error => { throw error.name === 'AbortError' ? error : Error('The server does not answer; is it still running?') })
  if (!response.ok) throw Error((await response.json()).error)
  return question === 'stream' ? response : state.answers[key(question, fields)] = await response.json()
}

// Runs what the user asked for, says that it is being computed, and says what went wrong; returns whether all went well.
async function doing(what, work) {
  const own = ++state.doing
  const tell = sentence => { if (own === state.doing) say(sentence) }
  const waiting = setTimeout(tell, 150, what)
  try {
    await work()
    tell('')
    return true
  } catch (error) {
    if (error.name === 'AbortError') tell('')
    else say(error.message, true)
    return false
  } finally {
    clearTimeout(waiting)
  }
}

// --- the text -------------------------------------------------------------------------------------------------------

async function read() {
  const text = saved ? saved.text : $('text').value // which has its own ends of lines
  state.stop?.abort() // what continues another text
  return doing('Reading… the first text of a length compiles the model for it.', async () => {
    state.answers = Object.fromEntries(Object.entries(state.answers).filter(([asked]) => /^(row|map|health)/.test(asked)))
    const reads = await Promise.all(state.runs.map((_, run) => ask('read', { run, text })))
    Object.assign(state, { text, reads, row: null, stories: {} })
    $('beyond').hidden = true
    state.held = { run: 0, at: mostSurprising(reads[0].tokens) }
    await predict()
    drawMap()
  })
}

async function predict() {
  const { changes } = state
  state.nexts = await Promise.all(state.runs.map((_, run) => ask('next', { run, text: state.text, changes: changes[run] })))
  changes.forEach((ofRun, run) => { if (ofRun !== state.compared[run]) delete state.stories[`${run}-1`] })
  state.compared = changes
  if (!state.nexts.some(next => next.nats)) state.byChange = false
  drawTokens()
  drawInspector()
  drawComing()
}

const mostSurprising = tokens => tokens.reduce((best, token, at) => (token.nats ?? 0) > (tokens[best].nats ?? 0) ? at : best, 0)

function drawTokens() {
  $('reading').classList.toggle('two', state.runs.length > 1)
  refill('reading', ...state.reads.map((found, run) => {
    const changed = state.nexts[run]?.nats
    const nats = found.tokens.slice(1).reduce((sum, token) => sum + token.nats, 0)
    const after = changed?.slice(1).reduce((sum, value) => sum + value, 0)
    const most = state.runs[run].max_seq_len
    const mean = value => number(value / Math.max(1, found.tokens.length - 1), 3)
    const field = h('div.tokens', { role: 'group', 'aria-label': 'tokens', onkeydown: event => moveToken(event, run) })
    found.tokens.forEach((token, at) => field.append(...tokenElements(token, run, at, changed)))
    return h('div.card', null,
      h('div.head', null, h('h2', null, state.runs.length > 1 ? state.runs[run].name : 'Surprise'),
        h('small', null, `${mean(nats)} nats a token`, changed ? ` → ${mean(after)} changed` : '', `, ${number(nats / Math.LN2 / Math.max(1, found.bytes), 3)} bits a byte`)),
      field,
      found.cut ? h('p.note', null, `The text is longer; its first ${found.tokens.length} tokens are shown.`) : null,
      found.tokens.length > most ? h('p.note', null, `The model reads ${number(most)} tokens at a time, as in training, and begins anew behind them. What comes next follows from the last ${number(most)} of the text.`) : null,
      h('div.row', null, legend(), changed ? h('button', { type: 'button', 'aria-pressed': `${state.byChange}`,
        onclick: () => { state.byChange = !state.byChange; drawTokens() } }, 'Colour by change') : null))
  }))
  markShown()
}

function legend() {
  return state.byChange
    ? h('small', null, 'less surprised by the change', h('span.scale.change'), 'more')
    : h('small', null, 'as expected', h('span.scale.hot'), `surprising (${FULL_NATS} nats and more)`)
}

function tokenElements(token, run, at, changed) {
  const change = state.byChange && changed && at ? changed[at] - token.nats : 0
  const strength = state.byChange ? Math.min(1, Math.abs(change)) : Math.min(1, (token.nats ?? 0) / FULL_NATS)
  const space = /^ [^]/.test(token.shown) ? ' ' : '', text = token.shown.slice(space.length)
  const element = h('span.t', {
    role: 'button', tabindex: state.held?.run === run && state.held.at === at ? 0 : -1,
    '--s': 85 * strength, '--tone': state.byChange && change < 0 ? 'var(--cold)' : 'var(--hot)',
    'aria-label': `${text.trim() || visible(token.token)}${token.nats == null ? '' : `, ${token.nats.toFixed(1)} nats`}`,
    'data-at': at,
    onclick: () => hold(run, at), onmouseenter: () => point(run, at), onmouseleave: () => point(), onfocus: () => point(run, at),
  }, text.replaceAll('\n', '⏎'))
  if (/^<.*>$/.test(text)) element.classList.add('control')
  return [space, element, ...Array.from(text.match(/\n/g) ?? [], () => h('br'))]
}

function hold(run, at) {
  Object.assign(state, { held: { run, at }, row: null, pointed: null })
  drawInspector()
  drawMap()
}

// Shows the reads of a token while it is pointed at; an open row stays.
function point(run, at) {
  if (state.row) return
  state.pointed = run == null ? null : { run, at }
  drawInspector()
}

function moveToken(event, run) {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 8, ArrowUp: -8, Home: -1e9, End: 1e9 }[event.key]
  if (event.key === 'Enter' || event.key === ' ') hold(run, +document.activeElement.dataset.at)
  else if (!step) return
  event.preventDefault()
  if (!step) return
  const tokens = [...event.currentTarget.querySelectorAll('.t')]
  const at = Math.max(0, Math.min(tokens.length - 1, tokens.indexOf(document.activeElement) + step))
  tokens.forEach((token, i) => { token.tabIndex = i === at ? 0 : -1 })
  tokens[at].focus()
}

function markShown() {
  const shown = state.pointed ?? state.held
  document.querySelectorAll('#reading .tokens').forEach((field, run) => field.querySelectorAll('.t').forEach((token, at) => {
    token.classList.toggle('shown', shown?.run === run && shown.at === at)
    token.setAttribute('aria-pressed', state.held?.run === run && state.held.at === at)
  }))
}

// --- what a token read, and what a row does ---------------------------------------------------------------------------

function drawInspector() {
  markShown()
  const shown = state.pointed ?? state.held
  if (state.row) return
  if (!shown) return refill('inspector', h('p.soft', null, 'Read a text, then point at a token.'))
  const token = state.reads[shown.run].tokens[shown.at]
  const memory = state.runs[shown.run].memory
  const rows = token.layers.flatMap(reads => reads.map(([row]) => row))
  refill('inspector', 
    h('div.head', null, h('span', null, h('span.big', null, visible(token.token)), token.shown !== token.token ? h('small', null, token.shown === '·' ? ' goes on with a character' : ` begins ${token.shown}`) : null),
      h('small', null, state.runs.length > 1 ? `${state.runs[shown.run].name}, ` : '', `token ${shown.at}`)),
    token.nats == null ? h('p.soft', null, 'Every row of text begins with this token.')
      : h('p', null, h('b', null, `${token.nats.toFixed(2)} nats`), ` of surprise: it had a probability of ${percent(Math.exp(-token.nats))}.`),
    token.likely.length ? h('table', null, h('tr', null, h('th', { colspan: 3 }, 'What seemed likely here')), token.likely.map(([text, share]) =>
      h('tr', null, h('td', null, h('code', null, visible(text))), h('td.bar', null, bar(share)), h('td.n', null, percent(share))))) : null,
    memory ? h('div.layers', null, memory.layers.map((layer, i) => layerReads(shown.run, layer, token.layers[i]))) : h('p.note', null, state.runs[shown.run].remarks[0]),
    memory && !saved ? h('p', null, h('button', { type: 'button', onclick: () => change(shown.run, [...new Set(rows)].map(row => ({ row, scale: 0 }))) },
      token.layers.some(reads => reads.length < memory.reads) ? 'Switch off the rows that are shown' : 'Switch off all rows that this token read'),
      ' ', h('button', { type: 'button', onclick: () => change(shown.run, [{ row: null, scale: 0 }]) }, 'Switch off the bank')) : null)
}

const layerName = layer => layer === 'values' ? 'values' : `layer ${layer}`

function layersOf({ memory: { layers }, n_layers }) {
  const numbered = layers.filter(layer => layer !== 'values').length
  return [numbered < layers.length ? ['values'] : [], numbered ? [`${numbered} of ${n_layers} layers`] : []].flat().join(' and ')
}

function layerReads(run, layer, reads) {
  const ngrams = state.runs[run].memory.ngrams[layer]
  const weighs = reads.some(([, , , weight]) => weight != null)
  const scores = reads.map(([, , score, weight]) => weight ?? score ?? 0)
  const least = weighs ? 0 : Math.min(...scores), most = Math.max(...scores.map(Math.abs))
  const share = value => most === least ? 1 : weighs ? Math.abs(value) / most : 0.12 + 0.88 * (value - least) / (most - least)
  let head = -1
  const lines = [...reads].sort((a, b) => a[1] - b[1]).map(([row, of, score, weight, ngram]) => {
    const first = of !== head
    head = of
    const snippet = state.reads[run].snippets[row]
    return h('tr', { title: snippet ?? '' },
      h('td.n', null, first && state.runs[run].memory.heads > 1 ? `head ${of}` : ''),
      h('td', null, rowButton(run, row, layer), snippet ? h('small', null, ` ${snippet.slice(0, 40)}…`) : null),
      ngram != null ? [h('td', { colspan: weight != null ? 1 : 2 }, h('code', null, `“${visible(ngram)}”`)), weight != null ? h('td.n', null, weight.toFixed(3)) : null]
        : [h('td.bar', null, bar(share(weight ?? score))), h('td.n', null, weight != null ? weight.toFixed(3) : score.toFixed(1))])
  })
  const what = ngrams.length ? `rows addressed by the last tokens${weighs ? ', and their weights' : ''}` : weighs ? 'rows and their weights' : 'rows and their scores'
  const all = state.runs[run].memory.reads
  return h('section', null, h('h3', null, `${layerName(layer)}: ${what}${reads.length < all ? `, the strongest ${reads.length} of ${all}` : ''}`), h('table', null, lines))
}

// A saved page holds some rows: those that were opened, or those that its text reads most.
function unlessKept(fields) {
  return saved && !(key('row', fields) in saved.answers) ? { disabled: true, title: 'not in the saved page; the server shows every row' } : {}
}

function rowButton(run, row, layer, text = `#${row}`) {
  const isOff = state.changes[run].some(change => (change.row ?? row) === row && change.scale === 0)
  return h('button.link' + (isOff ? '.off' : ''), { type: 'button', ...unlessKept({ run, row, layer }), 'aria-label': `open row ${row} of ${layerName(layer)}`, onclick: () => openRow(run, row, layer) }, text)
}

async function openRow(run, row, layer) {
  await doing(`Looking up row ${row}…`, async () => {
    const found = await ask('row', { run, row, layer })
    Object.assign(state, { row: { run, row, layer }, pointed: null })
    drawRow(run, found)
    drawMap()
    $('inspector').scrollTop = 0
    $('inspector').focus({ preventScroll: true })
    $('inspector').scrollIntoView({ block: innerWidth > 900 ? 'nearest' : 'start' })
  })
}

function closeRow() {
  state.row = null
  drawInspector()
  drawMap()
}

function drawRow(run, found) {
  const { row, layer, effect } = found
  const scale = h('input', { type: 'number', min: -1000, max: 1000, step: 'any', value: 2, required: true, 'aria-label': 'factor' })
  const other = h('input.row-number', { type: 'number', min: 0, max: state.runs[run].memory.rows - 1, required: true, 'aria-label': 'other row' })
  if (found.nearest.length) other.value = found.nearest[0][0]
  const edits = h('div.row', null,
    h('button', { type: 'button', onclick: () => change(run, [{ row, scale: 0 }]) }, 'Switch off'),
    h('form.row', { onsubmit: event => { event.preventDefault(); change(run, [{ row, scale: +scale.value }]) } }, h('button', null, 'Scale by'), scale),
    h('form.row', { onsubmit: event => { event.preventDefault(); change(run, [{ row, other: +other.value }]) } }, h('button', null, 'Exchange with'), other))
  const gain = token => token.probability - token.probability_without
  const points = change => `${change > 0 ? '+' : ''}${Math.abs(change) < 10 ? change.toPrecision(2) : change.toFixed(0)}`
  const strongest = (tokens, kind) => h('div', null, h('h3', null, kind === '.up' ? 'made more likely' : 'made less likely'),
    h('table', null, tokens.slice(0, 8).map(token => h('tr', { title: `${percent(token.probability_without)} without, ${percent(token.probability)} with` },
      h('td', null, h('code', null, visible(token.token))), h('td.bar', null, bar(Math.abs(gain(token) / (gain(tokens[0]) || 1)), kind)),
      h('td.n', null, points(100 * gain(token)))))))
  refill('inspector', 
    h('div.head', null, h('h2', null, `Row ${row}${state.runs.length > 1 ? ` of ${state.runs[run].name}` : ''}`),
      h('button', { type: 'button', onclick: closeRow }, '← back to the token')),
    h('div.tabs', null, state.runs[run].memory.layers.map(number => h('button', { type: 'button', 'aria-pressed': `${number === layer}`,
      ...unlessKept({ run, row, layer: number }), onclick: () => openRow(run, row, number) }, layerName(number)))),
    found.range ? h('p.note', null, `It lies in the range of head ${found.range.head}, which ${found.range.token == null ? 'finds it by a hash' : `reads it after “${visible(found.range.token)}” alone`}.`) : null,
    found.snippet ? h('p.note', null, 'It started from the text: ', h('i', null, found.snippet)) : null,
    found.taken == null ? h('p.note', null, state.runs[run].remarks.at(-1) ?? 'The validation text is still being read.')
    : !found.taken ? h('p', null, h('b', null, 'Not read'), ` in ${number(found.positions)} tokens of the validation text by this layer.`) : [
      h('p', null, h('b', null, `Read at ${number(found.taken)}`), ` of ${number(found.positions)} tokens of the validation text (${percent(found.taken / found.positions)}): number ${number(found.rank)} of ${number(state.runs[run].memory.rows)} rows in this layer.`),
      strip(found.strip)],
    saved ? null : edits,
    found.ngrams?.length ? [h('h3', null, 'n-grams that address it, by how often'), h('p', null, found.ngrams.map(([text, count]) => [h('code', null, `“${visible(text)}”`), h('small', null, ` ×${count}  `)]))] : null,
    effect ? [h('div.pair', null, strongest(effect.up, '.up'), strongest(effect.down, '.down')),
      h('small', null, `Change of the next token's probability, in percentage points, by this row's value against an average row, over ${effect.contexts} places that read it${found.strength_is ? ' most' : ''}. The log-probability of the token that really follows changes by ${effect.next_token_gain > 0 ? '+' : ''}${effect.next_token_gain.toFixed(3)} nats.`)] : null,
    contextList(found),
    h('h3', null, 'Rows nearest to it, by the cosine of their values'),
    h('table', null, found.nearest.map(([at, cosine, reads]) => h('tr', null, h('td', null, rowButton(run, at, layer)), h('td.bar', null, bar(Math.max(0, cosine))),
      h('td.n', null, cosine.toFixed(2)), h('td.n', null, reads == null ? '' : `${number(reads)} reads`)))))
}

function contextList({ contexts, strength_is }) {
  if (!contexts?.length) return null
  const lines = contexts.map(context => h('div.context', null, strength_is ? h('span', { title: strength_is }, number(context.strength, 2)) : null,
    context.before, h('mark', null, context.token), context.after))
  return [h('h3', null, `${strength_is ? 'Where it is read most' : 'Some places where it is read'}: after the marked token`), lines.slice(0, 6),
    lines.length > 6 ? h('details', null, h('summary.soft', null, `${lines.length - 6} more`), lines.slice(6)) : null]
}

function strip(counts) {
  const canvas = h('canvas.strip', { width: counts.length, height: 1, role: 'img', 'aria-label': 'where in the text it is read' })
  paint(canvas, counts, 0)
  return h('div', null, canvas, h('div.head', null, h('small', null, 'first token read'), h('small', null, 'where in the text'), h('small', null, 'last')))
}

// One pixel a count, the darker the larger, on a logarithmic scale from the smallest of them and `ground` on.
function paint(canvas, counts, ground = Infinity) {
  const context = canvas.getContext('2d'), image = context.createImageData(canvas.width, canvas.height)
  const least = Math.log1p(Math.min(...counts, ground)), range = Math.log1p(Math.max(...counts, 1)) - least, dark = matchMedia('(prefers-color-scheme: dark)').matches
  counts.forEach((count, i) => {
    const share = (Math.log1p(count) - least) / (range || 1)
    const [from, to] = dark ? [[40, 42, 50], [255, 196, 110]] : [[240, 236, 229], [120, 22, 60]]
    const middle = dark ? [150, 60, 90] : [226, 120, 60]
    const [a, b, t] = share < 0.5 ? [from, middle, share * 2] : [middle, to, share * 2 - 1]
    image.data.set([0, 1, 2].map(c => a[c] + (b[c] - a[c]) * t).concat(255), 4 * i)
  })
  context.putImageData(image, 0, 0)
}

// --- changes, next tokens, continuations ----------------------------------------------------------------------------

async function change(run, changes) {
  const before = state.changes[run], rows = new Set(changes.map(entry => entry.row))
  // A row's new factor takes the place of its last; where values change places, the order says which value it is for.
  const kept = [...before, ...changes].some(entry => entry.other != null) ? before : before.filter(entry => !rows.has(entry.row))
  await compare(withRun(run, [...kept, ...changes]))
}

const withRun = (run, changes) => state.changes.map((others, at) => at === run ? changes : others)

// Reads with these changes of the banks; if it fails they are taken back.
async function compare(changes) {
  state.changes = changes
  state.stop?.abort() // what continues with other changes
  if (!await doing('Reading with the changed bank…', predict)) {
    state.changes = state.compared
    drawComing()
  } else if (state.row) await openRow(state.row.run, state.row.row, state.row.layer)
}

function drawComing() {
  const chips = state.changes.flatMap((changes, run) => changes.map(entry => h('span.chip', null,
    `${state.runs.length > 1 ? `${state.runs[run].name}: ` : ''}${entry.row == null ? 'all rows' : `row ${entry.row}`} ${entry.other != null ? `⇄ row ${entry.other}` : entry.scale === 0 ? 'off' : `× ${entry.scale}`}`,
    h('button', { type: 'button', 'aria-label': `undo the change of ${entry.row == null ? 'all rows' : `row ${entry.row}`}`, onclick: () => compare(withRun(run, changes.filter(other => other !== entry))) }, '×'))))
  const all = chips.length > 12 ? [...chips.slice(0, 12), h('small', null, `and ${chips.length - 12} more`)] : chips
  if (chips.length) all.push(h('button', { type: 'button', onclick: () => compare(state.runs.map(() => [])) }, 'Undo all'))
  refill('changes', ...all)
  fill($('variants'), ...state.nexts.map((found, run) => {
    const isChanged = found.nats != null
    return h('div', null, state.runs.length > 1 ? h('h2', null, state.runs[run].name) : null,
      h('table', null, h('tr', null, h('th', null, 'next token'), h('th', { colspan: 2 }, isChanged ? 'as it is' : 'probability'), isChanged ? h('th', { colspan: 2 }, 'changed') : null),
        found.next.map(([text, before, after]) => h('tr', null, h('td', null, h('code', null, visible(text))),
          h('td.bar', null, bar(before)), h('td.n', null, percent(before)),
          isChanged ? [h('td.bar', null, bar(after, '.changed')), h('td.n', null, percent(after))] : null))),
      h('div.stories', null, variantsOf(run).map(variant => h('div', null, isChanged ? h('small', null, variant ? 'changed' : 'as it is') : null,
        h('div.story' + (variant ? '.changed' : ''), { id: `story-${run}-${variant}`, 'aria-label': 'continuation' }, state.stories[`${run}-${variant}`] ?? h('span.soft', null, 'Press Continue.'))))))
  }))
}

const variantsOf = run => state.nexts[run]?.nats ? [0, 1] : [0]

async function proceed(event) {
  event.preventDefault()
  state.stop?.abort()
  if (!saved && $('text').value !== state.text && !await read()) return
  const stop = state.stop = new AbortController()
  const sampling = state.sampling = Object.fromEntries([...new FormData($('sampling'))].map(([name, value]) => [name, +value]))
  const trained = state.runs.filter((run, at) => Math.min(run.max_seq_len, state.reads[at].tokens.length) + sampling.max_new_tokens > run.max_seq_len + 1)
  $('beyond').hidden = !trained.length
  $('beyond').textContent = trained.map(run => `${run.name} was trained on positions up to ${number(run.max_seq_len)}; this continuation may go beyond them.`).join(' ')
  $('stop').disabled = false
  await doing('Writing… the first continuation of a length compiles the model for it.', () => Promise.all(state.runs.flatMap((_, run) =>
    variantsOf(run).map(variant => write(run, variant, sampling, stop.signal)))))
  if (state.stop === stop) $('stop').disabled = true
}

async function write(run, variant, sampling, signal) {
  const name = `${run}-${variant}`, place = () => $(`story-${name}`)
  const fields = { run, text: state.text, changes: variant ? state.changes[run] : [], sampling }
  const add = piece => { state.stories[name] += piece; place()?.replaceChildren(state.stories[name]) }
  state.stories[name] = ''
  place().replaceChildren()
  const response = await ask('stream', fields, signal)
  if (saved) return add(response)
  const lines = response.body.pipeThrough(new TextDecoderStream()).getReader()
  for (let rest = ''; ;) {
    const { value, done } = await lines.read()
    signal.throwIfAborted() // also where a piece came first: its story may be another's by now
    if (done) return void (state.answers[key('stream', fields)] = state.stories[name])
    const parts = (rest + value).split('\n')
    rest = parts.pop()
    for (const part of parts.map(line => JSON.parse(line))) {
      if (part.error) throw Error(part.error)
      if (part.text) add(part.text)
    }
  }
}

// --- the bank and the log -------------------------------------------------------------------------------------------

function choices(label, names, chosen, choose) {
  return h('div.tabs', { role: 'group', 'aria-label': label }, names.map(([value, text]) =>
    h('button', { type: 'button', 'aria-pressed': `${value === chosen}`, onclick: () => choose(value) }, text)))
}

const runChoice = (chosen, choose) => state.runs.length > 1 ? choices('run', state.runs.map((run, i) => [i, run.name]), chosen, choose) : null

async function drawMap() {
  const { run, layer } = state.map, { memory, corpus, remarks, taught } = state.runs[run]
  const title = h('div.head', null, h('h2', { id: 'bank-title' }, 'The bank, by use'), runChoice(run, value => { state.map = { run: value, layer: null }; drawMap() }))
  if (!memory || !corpus) return refill('bank', title, h('p.note', null, memory ? remarks.at(-1) : `${state.runs[run].name} has no memory: nothing is read.`))
  const found = await ask('map', { run, layer }).catch(error => ({ error }))
  if (found.error) return say(found.error.message, true)
  const ofLayer = layer ?? memory.layers[0], { side, line } = found
  const rowAt = (x, y) => Math.min(memory.rows - 1, (y * line + x) * found.rows_per_cell)
  const canvas = h('canvas.map', { width: side, height: side, role: 'img', 'aria-label': 'map of the bank: each point is a row; the stronger its colour, the more it is read' })
  const cell = event => [event.offsetX / canvas.clientWidth, event.offsetY / canvas.clientHeight].map(part => Math.max(0, Math.min(side - 1, Math.floor(part * side))))
  const gate = memory.ngrams[ofLayer].length === 0
  const caption = h('small', null, `${number(found.used)} of ${number(memory.rows)} rows are read in ${number(found.positions)} tokens of the validation text${found.done ? '' : ' so far'}, ${number(Math.min(...found.cells))} to ${number(Math.max(...found.cells))} times each${found.rows_per_cell > 1 ? ' point' : ''}. The stronger a point's colour, the more it is read; blue points are the rows of the held token, or the open row. `,
    gate ? 'A line is the first sub-key of a row, a column its second.' : memory.own_ranges ? 'The ranges of the heads stand one behind the other.' : 'Rows stand in the order of their hash.')
  const under = h('p.pointed') // of one height, or the map would move away from the mouse
  canvas.addEventListener('mousemove', event => {
    const [x, y] = cell(event), row = rowAt(x, y)
    under.replaceChildren(h('small', null, `row ${row}${found.rows_per_cell > 1 ? ' and its neighbours' : ''}${gate ? `, sub-keys ${Math.floor(row / line)} and ${row % line}` : ''}: read ${number(found.cells[y * side + x])} times; click opens it`))
  })
  canvas.addEventListener('mouseleave', () => under.replaceChildren())
  canvas.addEventListener('click', event => openRow(run, rowAt(...cell(event)), ofLayer))
  paint(canvas, found.cells)
  markRows(canvas, run, layer, line, found.rows_per_cell)
  const go = h('input.row-number', { type: 'number', min: 0, max: memory.rows - 1, required: true, 'aria-label': 'row to open', placeholder: 'row' })
  refill('bank', title,
    choices('layer', [[null, 'all layers'], ...memory.layers.map(number => [number, layerName(number)])], layer, value => { state.map.layer = value; drawMap() }),
    h('div.bank', null, h('div', null, h('p', null, canvas), under, h('p', null, caption)),
      h('div', null, h('h3', null, 'Read most'), h('div.hottest', null, found.hottest.map(([row, reads]) => h('span', null, rowButton(run, row, ofLayer), h('small', null, ` ${number(reads)}`)))),
        taught.rows ? [h('h3', null, `Taught: ${number(taught.rows)} rows; these moved farthest`), h('div.hottest', null, taught.farthest.map(row => h('span', null, rowButton(run, row, ofLayer))))] : null,
        saved ? null : h('form.row', { onsubmit: event => { event.preventDefault(); openRow(run, +go.value, ofLayer) } }, go, h('button', null, 'Open')))))
  clearTimeout(state.polling)
  const later = () => { state.polling = setTimeout(() => $('bank').contains(document.activeElement) ? later() : drawMap(), 2000) }
  if (!found.done && !saved) later()
}

// Rings around the rows that the held token read, or the open row.
function markRows(canvas, run, layer, line, pooled) {
  const context = canvas.getContext('2d'), { held, row } = state
  const layers = state.runs[run].memory.layers
  let rows = []
  if (row?.run === run) rows = [row.row]
  else if (held?.run === run) rows = state.reads[run].tokens[held.at].layers.flatMap((reads, i) => layer == null || layers[i] === layer ? reads.map(([at]) => at) : [])
  context.fillStyle = matchMedia('(prefers-color-scheme: dark)').matches ? '#7ce0ff' : '#0b63d1'
  for (const at of rows) context.fillRect(Math.floor(at % line / pooled), Math.floor(Math.floor(at / line) / pooled), 1, 1)
}

async function drawHealth() {
  const found = await Promise.all(state.runs.map((_, run) => ask('health', { run })))
  const evals = found.map(log => log.evals)
  const named = (run, what) => state.runs.length > 1 ? `${state.runs[run].name} ${what}` : what
  const layers = name => evals.flatMap((log, run) => (log.at(-1)?.bank ?? []).map(({ layer }, i) => ({
    name: named(run, layerName(layer)), dash: run, points: log.map(at => [at.step, at.bank[i]?.[name]]) })))
  const worth = evals.map((log, run) => ({ name: named(run, ''), points: log.filter(at => at.probes.loss_zeroed != null).map(at => [at.step, at.probes.loss_zeroed - at.probes.loss]) }))
  fill($('training'), h('h2', { id: 'training-title' }, 'Training'),
    h('div.charts', null, chart('Loss, nats a token', found.flatMap((log, run) => [{ name: named(run, 'training'), thin: true, points: log.train }, { name: named(run, 'validation'), dash: run, points: log.evals.map(at => [at.step, at.loss]) }])),
    chart('Rise of the loss with all rows off', worth),
    chart('Share of the rows that are read', layers('used_share')),
    chart('Same best row where the next token is the same', layers('row_agreement'))))
}

function chart(title, lines) {
  lines = lines.map(line => ({ ...line, points: line.points.filter(([, y]) => y != null) })).filter(line => line.points.length)
  if (!lines.length) return null
  const W = 300, H = 112, points = lines.flatMap(line => line.points), ys = points.map(([, y]) => y)
  const right = Math.max(...points.map(([x]) => x), 1), sorted = [...ys].sort((a, b) => a - b)
  let low = sorted[0], high = sorted[Math.floor(sorted.length * 0.985)]
  if (number(low, 3) === number(high, 3)) [low, high] = [low - 0.001, high + 0.001] // which the ends of the axis can tell apart
  const px = x => 44 + (W - 50) * x / right, py = y => 8 + (H - 24) * (1 - Math.min(1.05, (y - low) / (high - low)))
  const text = (x, y, content, anchor = 'end') => `<text x="${x}" y="${y}" text-anchor="${anchor}">${content}</text>`
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg')
  svg.setAttribute('viewBox', `0 0 ${W} ${H}`)
  svg.setAttribute('role', 'img')
  svg.setAttribute('aria-label', `${title}: ${lines.map(line => `${line.name} ${number(line.points.at(-1)[1], 3)} at the end`).join(', ')}`)
  const shape = line => line.points.map(([x, y], i) => `${i ? 'L' : 'M'}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join('')
  svg.innerHTML = `<path class="axis" d="M44 ${H - 16}H${W - 6}"/>` + text(40, py(low) + 3, number(low, 3)) + text(40, py(high) + 5, number(high, 3)) +
    text(44, H - 3, '0', 'start') + text(W - 6, H - 3, `update ${number(right)}`) +
    lines.map((line, i) => `<path d="${shape(line)}" stroke="${COLOURS[i % COLOURS.length]}" ${line.thin ? 'opacity=".55"' : ''} ${line.dash ? 'stroke-dasharray="5 3"' : ''}/>` +
      (line.points.length === 1 ? `<circle cx="${px(line.points[0][0])}" cy="${py(line.points[0][1])}" r="2.5" fill="${COLOURS[i % COLOURS.length]}"/>` : '')).join('')
  const names = lines.filter(line => line.name).map((line, i) => {
    const name = h('small', null, line.name)
    name.style.color = COLOURS[i % COLOURS.length]
    return name
  })
  return h('div', null, h('h3', null, title), svg, h('div.row', null, names))
}

// The page as one file, with all answers that it got since the text was read.
async function save() {
  const [page, style, script] = await Promise.all(['.', 'page.css', 'page.js'].map(file => fetch(file).then(response => response.text())))
  const { text, runs, answers, sampling } = state
  const data = JSON.stringify({ text, runs, answers, sampling }).replaceAll('<', '\\u003c')
  const whole = page.replace('<link rel="stylesheet" href="page.css">', () => `<style>${style}</style>`)
    .replace('<script src="page.js"><\/script>', () => `<script type="application/json" id="saved">${data}<\/script>\n<script>${script}<\/script>`)
  h('a', { download: 'page.html', href: URL.createObjectURL(new Blob([whole], { type: 'text/html' })) }).click()
}

async function start() {
  state.runs = saved ? saved.runs : await fetch('api/runs').then(response => response.json())
  state.changes = state.compared = state.runs.map(() => [])
  fill($('runs'), ...state.runs.map(run => h('span', null, h('b', null, run.name), ` ${run.sublayer}, update ${number(run.step)}, ${number(run.parameters / 1e6)} M parameters, `,
    run.memory ? `${number(run.memory.rows)} rows of ${run.memory.width} for ${layersOf(run)}` : 'no memory')))
  for (const id of ['save', 'read', 'reads']) $(id).hidden = Boolean(saved)
  $('is-saved').hidden = !saved
  if (saved) {
    $('text').value = saved.text
    $('text').disabled = true
    for (const input of $('sampling').querySelectorAll('input')) {
      if (saved.sampling) input.value = saved.sampling[input.name]
      input.disabled = true
    }
  }
  $('ask').addEventListener('submit', event => { event.preventDefault(); read() })
  $('text').addEventListener('keydown', event => { if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) read() })
  $('sampling').addEventListener('submit', proceed)
  $('stop').addEventListener('click', () => { state.stop.abort(); $('stop').disabled = true })
  $('save').addEventListener('click', () => doing('Saving…', save))
  document.addEventListener('keydown', event => { if (event.key === 'Escape' && state.row) closeRow() })
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', drawMap)
  await drawHealth()
}

doing('Starting…', start).then(read)
