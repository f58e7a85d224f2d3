/** A second thread that reckons SHA-256 sums: an archive with them costs hardly more than one without. */
import { createHash } from 'node:crypto'
import { isMainThread, parentPort, Worker } from 'node:worker_threads'

/** A buffer, and where the files are in it. */
export interface Batch {
  buffer: ArrayBuffer
  files: { at: number; sizeBytes: number }[]
}

export interface Sums {
  buffer: ArrayBuffer
  sums: string[]
}

export interface SumThread {
  /** Takes the buffer over; it comes back with the sums. @throws Error when the thread has died */
  reckon(batch: Batch): Promise<Sums>
  end(): Promise<void>
}

export function startSumThread(): SumThread {
  const worker = new Worker(new URL(import.meta.url), {
    resourceLimits: { maxOldGenerationSizeMb: 16, maxYoungGenerationSizeMb: 2 },
  })
  const waiting: { resolve: (sums: Sums) => void; reject: (error: Error) => void }[] = []
  let failure: Error | undefined
  const fail = (error: Error) => {
    failure ??= error
    for (const one of waiting.splice(0)) one.reject(failure)
  }
  // In the order in which they were asked for.
  worker.on('message', (sums: Sums) => waiting.shift()?.resolve(sums))
  worker.on('error', fail)
  worker.on('exit', () => fail(new Error('the thread that reckons the sums has ended')))
  return {
    reckon: (batch) =>
      new Promise((resolve, reject) => {
        if (failure) return reject(failure)
        waiting.push({ resolve, reject })
        worker.postMessage(batch, [batch.buffer])
      }),
    async end() {
      await worker.terminate()
    },
  }
}

if (!isMainThread) {
  parentPort?.on('message', ({ buffer, files }: Batch) => {
    const sums = files.map(({ at, sizeBytes }) =>
      createHash('sha256')
        .update(Buffer.from(buffer, at, sizeBytes))
        .digest('hex'),
    )
    parentPort?.postMessage({ buffer, sums } satisfies Sums, [buffer])
  })
}
