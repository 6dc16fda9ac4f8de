// node watch_player.mjs URL WORKFLOW.json SHOTS SEED SECONDS free|closed classic|vue
//
// Presses Run on a small form of the workflow and watches the player in its decode node; after its start a second browser
// opens the same workflow and joins. Both watch to the end. The first page then has the host's finished video instead; in
// the second, which did not ask for the run and is not told of its end, the node is deleted. Prints what was seen as one JSON object
// and judges nothing: that is test_player.py's part. `free` lifts the page's policy on outside connections, which the
// test's server sets and which forbids feeding a video.

import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { openPage } from './page.mjs'

const [url, file, shots, seed, seconds, policy, nodes] = process.argv.slice(2)
const workflow = JSON.parse(readFileSync(file, 'utf8'))
const name = `player-${policy}-${nodes}`

const [first, second] = await Promise.all([open(), open()])
await load(first)
// Played without feeding it may begin after the run, when the first page has the finished video.
const viewers = policy === 'free' ? [first, second] : [second]
if (policy !== 'free') await load(second)
await first.page.evaluate(() => app.queuePrompt(0))
await viewers[0].page.waitForFunction(() => seen.begun, null, { timeout: 120_000 })
const begun = await viewers[0].page.evaluate(() => ({ ...seen.begun }))
await first.page.screenshot({ path: join(shots, `${name}-begun.png`) })

if (policy === 'free') await load(second) // a page that comes later finds the running stream by itself
await second.page.waitForFunction(() => seen.begun, null, { timeout: 120_000 })
const joined = await second.page.evaluate(() => ({ ...seen.begun }))

const ends = await Promise.all(viewers.map(toTheEnd))
await second.page.screenshot({ path: join(shots, `${name}-ended.png`) })
const sought = policy === 'free' ? await seekAndPause(second.page) : null
await first.page.waitForFunction(() => app.nodeOutputs[seen.node.id], null, { timeout: 120_000 })
await first.page.waitForTimeout(1000)
const left = await first.page.evaluate(() => ({ source: seen.video.getAttribute('src'), height: seen.video.clientHeight }))
await first.page.screenshot({ path: join(shots, `${name}-finished.png`) })
const removed = await second.page.evaluate(async () => {
  const video = seen.video
  app.graph.remove(seen.node)
  await new Promise((done) => setTimeout(done, 500))
  return { connected: video.isConnected, source: video.getAttribute('src'), addresses: seen.addresses.size }
})
const problems = [...first.problems, ...second.problems]
await Promise.all([first.close(), second.close()])
console.log(JSON.stringify({ begun, joined, ends, sought, left, removed, problems }))

function open() {
  return openPage(url, { bypassCSP: policy === 'free' })
}

async function load({ page }) {
  await page.evaluate(async ([workflow, vue, seed, seconds]) => {
    await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)
    window.seen = { begun: null, waits: 0, addresses: new Set() }
    const { createObjectURL, revokeObjectURL } = URL
    URL.createObjectURL = (thing) => {
      const address = createObjectURL.call(URL, thing)
      if (thing instanceof MediaSource) seen.addresses.add(address)
      return address
    }
    URL.revokeObjectURL = (address) => (seen.addresses.delete(address), revokeObjectURL.call(URL, address))
    const small = {
      LiveAvatar_ImageLoader: { width: 96, height: 64 },
      LiveAvatar_AudioEncoder: { seconds: Number(seconds) },
      LiveAvatar_Sampler: { seed: Number(seed) },
    }
    const attach = new MutationObserver(() => {
      const video = document.querySelector('.liveavatar-player video')
      if (!video || video === seen.video) return
      seen.video = video
      video.addEventListener('playing', () => {
        seen.begun ??= { time: video.currentTime, line: line(), blob: video.src.startsWith('blob:') }
      })
      video.addEventListener('waiting', () => seen.waits++)
      video.addEventListener('ended', () => (seen.end ??= state(video)))
    })
    const state = (video) => ({
      time: video.currentTime,
      duration: video.duration,
      buffered: [...Array(video.buffered.length).keys()].map((i) => [video.buffered.start(i), video.buffered.end(i)]),
      frames: video.getVideoPlaybackQuality().totalVideoFrames,
      sound: video.webkitAudioDecodedByteCount,
      size: [video.videoWidth, video.videoHeight],
      waits: seen.waits,
      line: line(),
    })
    const line = () => document.querySelector('.liveavatar-player div')?.textContent
    attach.observe(document.body, { subtree: true, childList: true })
    await app.loadGraphData(workflow, true, true, 'player')
    seen.node = app.graph.nodes.find((node) => node.type === 'LiveAvatar_Decode')
    for (const node of app.graph.nodes)
      for (const widget of node.widgets ?? []) widget.value = small[node.type]?.[widget.name] ?? widget.value
    app.canvas.ds.scale = 1 // the decode node in the middle of the page
    app.canvas.centerOnNode(seen.node)
  }, [workflow, nodes === 'vue', seed, seconds])
}

async function toTheEnd({ page }) {
  await page.waitForFunction(() => seen.end, null, { timeout: 120_000 })
  return page.evaluate(() => seen.end)
}

async function seekAndPause(page) {
  return page.evaluate(async () => {
    const { video } = seen
    video.currentTime = 0.4
    await new Promise((done) => video.addEventListener('seeked', done, { once: true }))
    await video.play()
    await new Promise((done) => setTimeout(done, 300))
    video.pause()
    const paused = video.currentTime
    await new Promise((done) => setTimeout(done, 300))
    return { paused, after: video.currentTime }
  })
}
