// What the pipeline panel knows of a run and where it is drawn: reports put together, spans laid out as boxes.
// Pure functions; no element, no words.

export const DECODER = -1 // stands where a stage would
const PREFILL = -1 // where a step would
const KEPT = 130 // seconds of spans
const SCALES = [2, 4, 8, 15, 30, 60, 120] // seconds that a strip may show
const BLOCKS_SHOWN = 6
const BLOCK_FRAMES = 12
const STEPS = ['#4c78a8', '#f58518', '#54a24b', '#e45756', '#72b7b2', '#b279a2', '#ff9da6', '#9d755d']
const SINK = '#777777'

/** What is known of a run after one more report. What a report leaves out has not changed; spans are told once. */
export function merge(known, report) {
  const { spans, heard } = known?.id === report.id ? known : { spans: [], heard: 0 }
  const fresh = report.spans.slice(Math.max(0, heard - report.spans_before)).map(unpack)
  return {
    ...(known?.id === report.id ? known : {}),
    ...report,
    ...(report.ideal && { ideal: { ...report.ideal, spans: report.ideal.spans.map(unpack) } }),
    spans: [...spans, ...fresh].filter((span) => span.end > report.now - KEPT),
    heard: Math.max(heard, report.spans_before + report.spans.length),
  }
}

function unpack([stage, kind, block, step, begin, end]) {
  return { stage, kind, block, step, begin, end }
}

/** Seconds that the strip shows: some blocks, or all there is; in few sizes, so that it does not change all the time. */
export function seconds({ spans, now }) {
  const ends = spans.filter((span) => span.stage === DECODER).map((span) => span.end).slice(-4)
  const block = ends.length > 1 ? (ends.at(-1) - ends[0]) / (ends.length - 1) : Infinity
  const all = now - Math.min(now, ...spans.map((span) => span.begin))
  return SCALES.find((scale) => scale >= Math.min(BLOCKS_SHOWN * block, all)) ?? SCALES.at(-1)
}

/** The ideal over and over, before 0 too, for so many seconds. Its last row, as the server counts, is the decoder's. */
export function tiles({ ideal, places }, length) {
  if (!ideal?.spans.length) return []
  const turns = [...Array(Math.ceil(length / ideal.seconds) + 1).keys()]
  return turns.flatMap((turn) =>
    ideal.spans.map((span) => ({
      ...span,
      stage: span.stage === places.length ? DECODER : span.stage,
      begin: span.begin + (turn - 1) * ideal.seconds,
      end: span.end + (turn - 1) * ideal.seconds,
    })),
  )
}

/** Frames a second if nothing were ever late. */
export function idealRate({ ideal, places }) {
  if (!ideal) return null
  return (BLOCK_FRAMES * ideal.spans.filter((span) => span.stage === places.length).length) / ideal.seconds
}

/** Share of the time between `from` and `to` in which the decoder was at work. */
export function decoding(spans, from, to) {
  const inside = spans.filter((span) => span.stage === DECODER && span.end > from)
  return inside.reduce((sum, span) => sum + span.end - Math.max(span.begin, from), 0) / (to - from)
}

/** Top and height of each row in `height`; rows are no higher than they need be. */
export function rows(count, height) {
  const pitch = Math.min(40, height / count)
  const gap = pitch > 12 ? 3 : 1
  return [...Array(count).keys()].map((row) => ({ top: row * pitch, height: pitch - gap }))
}

/**
 * Boxes for what lies between `from` and `to`, drawn between `left` and `left + width`: hops fill their row, copies are
 * a line at its bottom. `lines`: as `rows` gives them, the decoder's last.
 */
export function boxes(spans, { from, to, left, width, lines }) {
  const x = (when) => left + ((Math.min(Math.max(when, from), to) - from) / (to - from)) * width
  return spans
    .filter((span) => span.end > from && span.begin < to && span.stage < lines.length - 1)
    .map((span) => {
      const line = lines[span.stage === DECODER ? lines.length - 1 : span.stage]
      const copy = span.kind === 'copy'
      return {
        span,
        copy,
        left: x(span.begin),
        width: Math.max(1, x(span.end) - x(span.begin)),
        top: copy ? line.top + line.height - 2 : line.top,
        height: copy ? 2 : line.height - 2,
        colour: copy ? '#c8a200' : span.step === PREFILL ? SINK : STEPS[span.step % STEPS.length],
      }
    })
}

/** Whole seconds between `from` and `to` for an axis, some six of them. */
export function ticks(from, to) {
  const every = [1, 2, 5, 10, 20, 30].find((step) => (to - from) / step <= 8) ?? 30
  const first = Math.ceil(Math.max(0, from) / every)
  return [...Array(Math.max(0, Math.floor(to / every) - first + 1)).keys()].map((i) => (first + i) * every)
}
