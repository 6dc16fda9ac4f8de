// The pipeline panel: what each stage does and when, beside the ideal; rates, memory, and what went wrong.
// Knows the server's reports and elements; nothing of graphs.

import { Hold } from './hold.mjs'
import { boxes, decoding, idealRate, merge, rows, seconds, ticks, tiles } from './strip.mjs'
import { say } from './words.mjs'

const LABELS = 190 // pixels
const HEAD = 16
const AXIS = 14
const IDEAL = 0.25 // of the width of the strips
const GAP = 16
const FONT = '11px sans-serif'

export class Monitor {
  constructor() {
    this.run = null
    this.drawn = []
    this.element = part('div', 'display:flex; flex-direction:column; gap:4px; height:100%; padding:6px 10px; box-sizing:border-box; font:12px sans-serif; color:var(--input-text, #ddd)')
    this.element.className = 'liveavatar-monitor'
    this.hold = new Hold()
    this.line = part('span', 'flex:1; overflow:hidden; text-overflow:ellipsis')
    this.problem = part('div', 'color:var(--error-text, #ff4444); white-space:pre-wrap')
    this.canvas = part('canvas', 'position:absolute; inset:0; width:100%; height:100%')
    this.memory = part('div', 'flex:0 0 200px; overflow:auto')
    const head = part('div', 'display:flex; gap:12px; align-items:center; min-height:18px')
    const body = part('div', 'display:flex; gap:12px; flex:1; min-height:0')
    const strips = part('div', 'position:relative; flex:1; min-width:0')
    head.append(this.line, this.hold.element)
    strips.append(this.canvas)
    body.append(strips, this.memory)
    this.element.append(head, this.problem, body)
    this.canvas.addEventListener('mousemove', (event) => this.#explain(event))
    new ResizeObserver(() => this.#draw()).observe(strips)
    const colours = new MutationObserver(() => this.#draw()) // which the host sets there
    colours.observe(document.documentElement, { attributeFilter: ['style', 'class'] })
    this.#show()
  }

  /** Into an element of the page's, whose height it takes. */
  moveTo(place) {
    place.style.height = '100%'
    place.replaceChildren(this.element)
    this.#show()
  }

  /** A report of the server; null: it has none. */
  tell(report) {
    if (report) this.run = merge(this.run, report)
    this.#show()
  }

  #show() {
    if (!this.element.isConnected) return
    this.hold.tell(this.run)
    this.line.textContent = this.run ? describe(this.run) : say('Nothing has run yet. While a video is made, this shows what each stage does and when, beside the ideal; its rate against real time; memory; and errors.')
    this.problem.textContent = this.run?.problem ?? ''
    this.#showMemory()
    this.#draw()
  }

  #showMemory() {
    const { planned = {}, memory = {} } = this.run ?? {}
    const devices = [...new Set([...Object.keys(planned), ...Object.keys(memory)])]
    this.memory.style.display = devices.length ? '' : 'none'
    this.memory.replaceChildren(...devices.map((device) => gauge(device, memory[device], planned[device])))
  }

  #draw() {
    const { canvas, run } = this
    const { clientWidth: width, clientHeight: height } = canvas
    if (!width || !height) return
    canvas.width = width * devicePixelRatio
    canvas.height = height * devicePixelRatio
    this.drawn = []
    if (!run?.places && !run?.spans.length) return
    const brush = canvas.getContext('2d')
    brush.scale(devicePixelRatio, devicePixelRatio)
    const style = getComputedStyle(this.element)
    const ink = style.color
    const dim = style.getPropertyValue('--descrip-text') || '#999'
    const empty = style.getPropertyValue('--comfy-input-bg') || '#333'
    const places = run.places ?? []
    const lines = rows(places.length + 1, height - HEAD - AXIS).map((line) => ({ ...line, top: line.top + HEAD }))
    const length = seconds(run)
    const ideal = (width - LABELS - GAP) * IDEAL
    const real = { from: run.now - length, to: run.now, left: LABELS, width: width - LABELS - GAP - ideal, lines }
    const perfect = { from: 0, to: (length * ideal) / real.width, left: width - ideal, width: ideal, lines }
    brush.font = FONT
    brush.textBaseline = 'middle'
    const write = (text, x, y, colour = ink, align = 'left') => {
      brush.fillStyle = colour
      brush.textAlign = align
      brush.fillText(text, x, y)
    }
    write(say('busy'), LABELS - 44, HEAD / 2, dim, 'right')
    write(say('queue'), LABELS - 8, HEAD / 2, dim, 'right')
    write(say('last {seconds} s', { seconds: length }), real.left, HEAD / 2, dim)
    write(say('ideal'), perfect.left, HEAD / 2, dim)
    lines.forEach(({ top, height }, row) => {
      const middle = top + height / 2 - 1
      const place = places[row]
      const { busy = 0, waiting = 0 } = run.stages[row] ?? {}
      const share = place ? busy : decoding(run.spans, real.from, real.to)
      const name = place ? `${row}  ${place.device}` : `VAE  ${run.decoder ?? ''}`
      const detail = place && height > 26 ? say('steps {steps}, layers {layers}', { steps: span(place.steps), layers: span(place.layers) }) : ''
      write(name, 0, detail ? middle - 6 : middle)
      write(detail, 0, middle + 7, dim)
      write(`${Math.round(100 * Math.min(1, share))} %`, LABELS - 44, middle, ink, 'right')
      if (place) write(waiting, LABELS - 8, middle, ink, 'right')
      brush.globalAlpha = 0.5
      brush.fillStyle = empty
      brush.fillRect(real.left, top, real.width, height - 2)
      brush.fillRect(perfect.left, top, perfect.width, height - 2)
      brush.globalAlpha = 1
    })
    this.drawn = [...boxes(run.spans, real), ...boxes(tiles(run, perfect.to), perfect)]
    for (const box of this.drawn) {
      brush.fillStyle = box.colour
      brush.fillRect(box.left, box.top, Math.max(1, box.width - (box.width > 4 ? 1 : 0)), box.height)
    }
    for (const { span, copy, left, top, width, height } of this.drawn) {
      if (copy || span.block < 0 || height < 9 || left >= perfect.left) continue
      const text = String(span.block)
      if (brush.measureText(text).width + 4 < width) write(text, left + 3, top + height / 2, '#fff')
    }
    for (const when of ticks(real.from, real.to)) {
      const x = real.left + ((when - real.from) / length) * real.width
      if (x < width - ideal - GAP) write(`${when} s`, x, lines.at(-1).top + lines.at(-1).height + AXIS / 2, dim, 'center')
    }
  }

  /** What is under the pointer, in the browser's own way. */
  #explain({ offsetX: x, offsetY: y }) {
    const found = this.drawn.findLast((box) => x >= box.left && x <= box.left + box.width && y >= box.top && y <= box.top + box.height)
    const ms = found && Math.round(1000 * (found.span.end - found.span.begin))
    if (!found) this.canvas.title = ''
    else if (found.copy) this.canvas.title = say('copy to the next stage: {ms} ms', { ms })
    else if (found.span.block < 0) this.canvas.title = say('attention sink: {ms} ms', { ms })
    else this.canvas.title = say('block {block}, step {step}: {ms} ms', { ...found.span, ms })
  }
}

/** "making · 12 of 40 blocks · 17.2 of 25 frames a second, ideal 18.0 · first frames after 3.1 s" */
function describe(run) {
  const { places, spans, paused, ended, problem, blocks, total, fps, speed, first, late } = run
  const rate = idealRate(run)
  const parts = []
  if (problem) parts.push(say('ended early'))
  else if (ended) parts.push(blocks < total ? say('stopped') : say('done'))
  else if (paused) parts.push(say('paused'))
  else parts.push(places || spans.length ? say('running') : say('loading the model'))
  parts.push(say('{blocks} of {total} blocks', { blocks, total }))
  if (run.plan) parts.push(say('plan {plan}', { plan: run.plan }))
  if (fps) parts.push(say('{fps} of {speed} frames a second', { fps: fps.toFixed(1), speed }))
  if (fps && rate) parts.push(say('ideal {rate}', { rate: rate.toFixed(1) }))
  if (first !== null) parts.push(say('first frames after {first} s', { first: first.toFixed(1) }))
  if (late) parts.push(late === 1 ? say('1 block late') : say('{late} blocks late', { late }))
  return parts.join(' · ')
}

/** A device's name and figures over a bar that is as full as the device is of what was planned. */
function gauge(device, used, planned) {
  const share = (100 * (used ?? 0)) / Math.max(used ?? 0, planned ?? 0)
  const bar = part('div', `display:flex; justify-content:space-between; gap:8px; padding:1px 4px; margin-bottom:2px; font-size:11px; background:linear-gradient(to right, #4c78a899 ${share}%, var(--comfy-input-bg, #333) ${share}%)`)
  const name = part('span', '')
  name.textContent = device
  const figures = part('span', '')
  if (used === undefined) figures.textContent = say('{planned} planned', { planned: size(planned) })
  else if (planned === undefined) figures.textContent = say('{used} in use', { used: size(used) })
  else figures.textContent = say('{used} of {planned} planned', { used: size(used), planned: size(planned) })
  bar.append(name, figures)
  return bar
}

function size(bytes) {
  return bytes < 2 ** 30 ? `${Math.round(bytes / 2 ** 20)} MiB` : `${(bytes / 2 ** 30).toFixed(1)} GiB`
}

/** [0, 4] -> "0–3" */
function span([first, end]) {
  return end - first > 1 ? `${first}–${end - 1}` : String(first)
}

function part(name, style) {
  const element = document.createElement(name)
  element.style.cssText = style
  return element
}
