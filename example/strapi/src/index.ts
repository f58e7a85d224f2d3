import type { Core } from '@strapi/strapi'
import { WebSocketServer } from 'ws'

const application = {
  bootstrap({ strapi }: { strapi: Core.Strapi }) {
    const { httpServer } = strapi.server
    const echo = new WebSocketServer({ noServer: true })
    echo.on('headers', (headers) => headers.push(`x-release: ${process.env.RELEASE || 'none'}`))
    echo.on('connection', (client) => {
      client.on('error', (error) => strapi.log.warn(`/ws: ${error.message}`))
      client.on('message', (message, isBinary) => client.send(message, { binary: isBinary }))
    })

    httpServer.on('upgrade', (request, socket, head) => {
      if (request.url?.split('?')[0] === '/ws') {
        echo.handleUpgrade(request, socket, head, (client) => echo.emit('connection', client, request))
      } else if (httpServer.listenerCount('upgrade') === 1) {
        // In development Vite listens too and answers its own; alone, we must end what nobody will answer.
        socket.end('HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n')
      }
    })
  },
}

export default application
