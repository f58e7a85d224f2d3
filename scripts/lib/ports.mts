/** Who listens on this host. */
import { createServer } from 'node:net'
import { ask } from './command.mts'

/** Whether nobody listens there yet. */
export function isFree(address: string): Promise<boolean> {
  const host = address.slice(0, address.lastIndexOf(':'))
  const port = Number(address.split(':').at(-1))
  return new Promise((resolve) => {
    const server = createServer()
    server.on('error', (error) => resolve(!('code' in error && error.code === 'EADDRINUSE')))
    server.listen({ host, port, exclusive: true }, () => server.close(() => resolve(true)))
  })
}

/** Name of the program that listens on a TCP port; undefined when nobody does, or when only root may know. */
export async function listener(port: string): Promise<string | undefined> {
  const rows = await ask([
    'ss',
    '--no-header',
    '--listening',
    '--tcp',
    '--numeric',
    '--processes',
    `sport = :${port}`,
  ])
  return /users:\(\("([^"]+)"/.exec(rows ?? '')?.[1]
}
