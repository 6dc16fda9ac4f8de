// node watch_player.mjs URL WORKFLOW.json SHOTS SEED
//
// Watches the player of a decode node in three pages, as three people: in classic nodes, in Vue nodes, and in a page
// that may not be fed (ComfyUI's own policy, which the other two are spared). The films come from hand_made/, a block
// when this script asks for it, so that no step depends on how fast anything is; the last one is a run of the workflow.
// Prints what was seen as one JSON object and judges nothing: that is test_player.py's part.

import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { openBrowser, openPage, untilReady } from './page.mjs'

const [url, file, shots, seed] = process.argv.slice(2)
const workflow = JSON.parse(readFileSync(file, 'utf8'))
const node = String(workflow.nodes.find(({ type }) => type === 'LiveAvatar_Decode').id)
const script = readFileSync(join(import.meta.dirname, 'watching.js'), 'utf8')
const SMALL = { node, width: 96, height: 64 }

const viewport = { width: 1100, height: 760 }
const browser = await openBrowser()
const [classic, vue, closed] = await Promise.all([
  openPage(url, { browser, script, viewport, bypassCSP: true }),
  openPage(url, { browser, script, viewport, bypassCSP: true }),
  openPage(url, { browser, script, viewport }),
])
await load(classic.page, false)
await load(closed.page, false)

const result = {}
Object.assign(result, await longFilm())
Object.assign(result, await fallbacks())
await Promise.all([vue.close(), closed.close()])
result.run = await pressRun(classic.page)
result.hundred = await manyFilms(classic.page, 100)
result.problems = [...classic.problems, ...vue.problems, ...closed.problems]
await browser.close()
console.log(JSON.stringify(result))

/** Begins with the first block; a second page joins, seeks, pauses, and is reloaded; both see the end, one twice. */
async function longFilm() {
  await classic.page.evaluate(() => seen.watchClaps())
  await classic.page.evaluate(() => {
    app.api.addEventListener('liveavatar.stream', ({ detail }) => detail.ready && (seen.told ??= performance.now()))
  })
  const film = await openFilm({ node, seconds: 6, width: 320, height: 240 })
  await film.write(1)
  await until(classic.page, () => seen.begun)
  const begun = await classic.page.evaluate(() => ({ ...seen.begun, after: seen.begun.clock - seen.told }))
  await film.write(4, { made_fps: 21.3, late: 1 })
  await until(classic.page, () => seen.line().includes('21.3'))
  const line = await classic.page.evaluate(() => seen.line())
  await classic.page.screenshot({ path: join(shots, 'player-classic.png') })
  const saved = await save(classic.page)

  await load(vue.page, true)
  await until(vue.page, () => seen.begun)
  const joined = await vue.page.evaluate(() => seen.begun)
  await vue.page.screenshot({ path: join(shots, 'player-vue.png') })
  const beyond = await seek(vue.page, 5)
  await film.write(4, { made_fps: 22.2 })
  await until(vue.page, () => seen.line().includes('22.2'))
  const paused = await vue.page.evaluate(() => seen.video.currentTime)

  await vue.page.reload({ waitUntil: 'domcontentloaded' })
  await untilReady(vue.page)
  await load(vue.page, true)
  await until(vue.page, () => seen.begun)
  const again = await vue.page.evaluate(() => seen.begun)
  await film.write(9)
  await film.close()
  const ends = await Promise.all([classic.page, vue.page].map(theEnd))
  await vue.page.screenshot({ path: join(shots, 'player-vue-ended.png') })
  const shown = await classic.page.evaluate(() => seen.frames.map(({ at }) => at))
  const back = await seek(classic.page, 0.5)
  await anew(classic.page)
  await classic.page.evaluate(() => void seen.video.play()) // a second time, while nothing else goes on
  await theEnd(classic.page)
  const { frames, sounds } = await classic.page.evaluate(() => seen)
  return { begun, line, saved, joined, beyond, paused, again, ends, shown, back, frames, sounds }
}

/** A page without a way to feed a video, one that may not be fed, and one that can do neither; a node goes meanwhile. */
async function fallbacks() {
  await Promise.all([classic.page, vue.page, closed.page].map(anew))
  await classic.page.evaluate(() => {
    seen.isTypeSupported = MediaSource.isTypeSupported
    MediaSource.isTypeSupported = () => false
  })
  const film = await openFilm({ ...SMALL, seconds: 1.6 })
  await film.write(2)
  await until(vue.page, () => seen.begun)
  const covered = await vue.page.evaluate(previewsShown)
  await vue.page.evaluate(() => app.graph.remove(app.graph.getNodeById(seen.node)))
  await until(vue.page, () => !seen.video.isConnected)
  const removed = await vue.page.evaluate(() => ({ source: seen.video.getAttribute('src'), addresses: seen.addresses.size }))
  await film.write(2)
  await film.close()
  const direct = await Promise.all([classic.page, closed.page].map(theEnd))
  await closed.page.screenshot({ path: join(shots, 'player-closed.png') })

  await Promise.all([classic.page, closed.page].map(anew))
  await closed.page.route('**/liveavatar/stream/*', (route) =>
    route.request().resourceType() === 'media' ? route.fulfill({ body: 'no film', contentType: 'video/mp4' }) : route.continue(),
  )
  const another = await openFilm({ ...SMALL, seconds: 1.6 })
  await another.write(2)
  await until(closed.page, () => seen.line().includes('cannot'))
  const unplayable = await closed.page.evaluate(() => ({ line: seen.line(), height: seen.video.clientHeight }))
  unplayable.previews = await closed.page.evaluate(previewsShown)
  await closed.page.screenshot({ path: join(shots, 'player-unplayable.png') })
  await another.close()
  const stopped = await theEnd(classic.page)
  await classic.page.evaluate(() => (MediaSource.isTypeSupported = seen.isTypeSupported))
  return { covered, removed, direct, unplayable, stopped }
}

/** A real run, held after its first block until the player has begun. Then the node has the host's finished video. */
async function pressRun(page) {
  await anew(page)
  await page.evaluate((seed) => {
    const small = {
      LiveAvatar_ImageLoader: { width: 96, height: 64 },
      LiveAvatar_AudioEncoder: { seconds: 1.6 },
      LiveAvatar_Sampler: { seed },
    }
    for (const node of app.graph.nodes)
      for (const widget of node.widgets ?? []) widget.value = small[node.type]?.[widget.name] ?? widget.value
    app.api.addEventListener('b_preview', () => (seen.previewed = true), { once: true }) // comes after the one with a node
    app.queuePrompt(0)
  }, Number(seed))
  const { id } = await running()
  await fetch(`${url}/liveavatar/stream/${id}/pause`, { method: 'POST' })
  await until(page, () => seen.begun && seen.previewed)
  const begun = await page.evaluate(() => seen.begun)
  const covered = await page.evaluate(() => seen.node in app.nodePreviewImages)
  await page.screenshot({ path: join(shots, 'player-run.png') })
  await fetch(`${url}/liveavatar/stream/${id}/resume`, { method: 'POST' })
  await until(page, () => app.nodeOutputs[seen.node] && !seen.video.hasAttribute('src'))
  await page.screenshot({ path: join(shots, 'player-finished.png') })
  return { begun, covered, height: await page.evaluate(() => seen.video.clientHeight) }
}

/** One short film after another in the same node; what the page holds after the first tenth and after all. */
async function manyFilms(page, count) {
  const tools = await page.context().newCDPSession(page)
  const holdings = []
  for (let done = 0; done < count; done++) {
    if (done === count / 10) holdings.push(await held())
    await anew(page)
    const film = await openFilm({ ...SMALL, seconds: 0.36 })
    await film.write(1)
    await until(page, () => seen.begun)
    await film.close()
  }
  holdings.push(await held())
  return holdings

  async function held() {
    await tools.send('HeapProfiler.collectGarbage')
    const { jsEventListeners: all, documents, nodes } = await tools.send('Memory.getDOMCounters')
    const { result } = await tools.send('Runtime.evaluate', { expression: 'seen.video' })
    const { listeners } = await tools.send('DOMDebugger.getEventListeners', { objectId: result.objectId })
    const { made, addresses } = await page.evaluate(() => ({ made: seen.made, addresses: seen.addresses.size }))
    return { all, documents, nodes, video: listeners.length, made, addresses }
  }
}

async function load(page, vue) {
  await page.evaluate(async ([workflow, vue, node]) => {
    await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)
    await app.loadGraphData(workflow, true, true, 'player')
    seen.node = Number(node)
    app.canvas.ds.scale = 1 // the decode node in the middle of the page
    app.canvas.centerOnNode(app.graph.getNodeById(seen.node))
  }, [workflow, vue, node])
}

async function seek(page, seconds) {
  await page.evaluate((seconds) => {
    seen.video.pause()
    seen.video.currentTime = seconds
  }, seconds)
  await until(page, () => !seen.video.seeking)
  return page.evaluate(() => seen.video.currentTime)
}

function anew(page) {
  return page.evaluate(() => void (seen.begun = seen.end = null))
}

async function theEnd(page) {
  await until(page, () => seen.end)
  return page.evaluate(() => seen.end)
}

function until(page, condition) {
  return page.waitForFunction(condition, null, { timeout: 400_000 })
}

/** A film that is to be written and closed. */
async function openFilm(wanted) {
  const act = async (action, body) => {
    const answer = await fetch(`${url}/hand_made/${action}`, { method: 'POST', body: JSON.stringify(body) })
    if (!answer.ok) throw new Error(`hand_made/${action}: ${answer.status}`)
    return answer.json()
  }
  const { id } = await act('open', wanted)
  return { id, write: (blocks, told = {}) => act('write', { id, blocks, ...told }), close: () => act('close', { id }) }
}

async function running() {
  for (;;) {
    const found = (await (await fetch(`${url}/liveavatar/streams`)).json()).find((state) => state.node === node && state.ready && !state.ended)
    if (found) return found
    await new Promise((done) => setTimeout(done, 20))
  }
}

async function save(page) {
  const [download] = await Promise.all([page.waitForEvent('download'), page.click('.liveavatar-player a')])
  const path = join(shots, 'player-saved.mp4')
  await download.saveAs(path)
  return { name: download.suggestedFilename(), path }
}

/** Whether the frontend takes a preview picture of the node. In the page. */
function previewsShown() {
  const node = String(seen.node)
  const detail = { blob: new Blob([]), nodeId: node, displayNodeId: node, parentNodeId: node, realNodeId: node, jobId: '' }
  app.api.dispatchCustomEvent('b_preview_with_metadata', detail)
  return node in app.nodePreviewImages
}
