/** A second thread that reckons SHA-256 sums: an archive with them costs hardly more than one without. */
import { createHash, type Hash } from 'node:crypto'
import { isMainThread, parentPort, Worker } from 'node:worker_threads'

/** A part of the archive, and where the files are in it. A file of many parts has one piece in each, and ends in the last. */
export interface Batch {
  buffer: ArrayBuffer
  used: number
  pieces: { at: number; sizeBytes: number; isLast: boolean }[]
  /** What came since the last `isMark` was taken back, before this. */
  goesBack: boolean
  isMark: boolean
}

export interface Sums {
  buffer: ArrayBuffer
  /** Of the files that end in the batch. */
  sums: string[]
}

export interface SumThread {
  /** Takes the buffer over; it comes back with the sums. @throws Error when the thread has died */
  reckon(batch: Batch): Promise<Sums>
  /** Sum of all batches together. */
  finish(): Promise<string>
  end(): Promise<void>
}

export function startSumThread(): SumThread {
  const worker = new Worker(new URL(import.meta.url), {
    resourceLimits: { maxOldGenerationSizeMb: 16, maxYoungGenerationSizeMb: 2 },
  })
  const waiting: { resolve: (answer: Sums) => void; reject: (error: Error) => void }[] = []
  let failure: Error | undefined
  const fail = (error: Error) => {
    failure ??= error
    for (const one of waiting.splice(0)) one.reject(failure)
  }
  // In the order in which they were asked for.
  worker.on('message', (sums: Sums) => waiting.shift()?.resolve(sums))
  worker.on('error', fail)
  worker.on('exit', () => fail(new Error('the thread that reckons the sums has ended')))
  const reckon = (batch: Batch) =>
    new Promise<Sums>((resolve, reject) => {
      if (failure) return reject(failure)
      waiting.push({ resolve, reject })
      worker.postMessage(batch, [batch.buffer])
    })
  return {
    reckon,
    async finish() {
      const nothing = { used: 0, pieces: [], goesBack: false, isMark: false }
      const { sums } = await reckon({ buffer: new ArrayBuffer(0), ...nothing })
      return sums[0] ?? ''
    },
    async end() {
      await worker.terminate()
    },
  }
}

if (!isMainThread) {
  let all = createHash('sha256')
  let marked = all.copy()
  let file: Hash | undefined
  parentPort?.on('message', ({ buffer, used, pieces, goesBack, isMark }: Batch) => {
    if (goesBack) all = marked
    if (goesBack) file = undefined
    if (isMark) marked = all.copy()
    const sums: string[] = []
    for (const { at, sizeBytes, isLast } of pieces) {
      file ??= createHash('sha256')
      file.update(Buffer.from(buffer, at, sizeBytes))
      if (!isLast) continue
      sums.push(file.digest('hex'))
      file = undefined
    }
    if (used === 0) sums.push(all.digest('hex'))
    else all.update(Buffer.from(buffer, 0, used))
    parentPort?.postMessage({ buffer, sums } satisfies Sums, [buffer])
  })
}
