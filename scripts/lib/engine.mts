/** Asks the container engine over its socket: 10 ms a question, where `docker` needs 100 and `docker compose` 400. */
import { getUrl } from './http.mts'

/** The fields that we read of `GET /containers/NAME/json`. https://docs.docker.com/reference/api/engine/version/v1.41/ */
export interface Container {
  Id: string
  /** With a slash in front. */
  Name: string
  /** Of the image that it really runs. */
  Image: string
  RestartCount: number
  State: {
    Status: string
    StartedAt: string
    FinishedAt: string
    ExitCode: number
    Health?: { Status: string } | null
  }
  Config: { Image: string; Labels: Record<string, string>; Env: string[] }
  HostConfig: {
    RestartPolicy: { Name: string }
    PortBindings: Record<string, { HostIp: string; HostPort: string }[] | null> | null
  }
  /** `Source` is a path of this host, also for a volume of the local driver. */
  Mounts: { Type: string; Name?: string; Source: string; Destination: string }[]
  NetworkSettings: { Networks: Record<string, { NetworkID: string; Aliases: string[] | null }> }
}

export interface Image {
  Id: string
  Created: string
  Config: { Env: string[] | null }
}

const socketPath = (process.env.DOCKER_HOST ?? 'unix:///var/run/docker.sock').replace(/^unix:\/\//, '')

/** The container of that name or id, or undefined. @throws Error when the engine does not answer */
export async function container(name: string): Promise<Container | undefined> {
  return await get<Container>(`/containers/${encodeURIComponent(name)}/json`)
}

/** The image of that name or id, or undefined. */
export async function image(name: string): Promise<Image | undefined> {
  return await get<Image>(`/images/${name}/json`)
}

/** The network of that name or id, or undefined. */
export async function network(name: string): Promise<{ Labels: Record<string, string> } | undefined> {
  return await get(`/networks/${encodeURIComponent(name)}`)
}

/** Folder of this host that a volume of the local driver is in, or undefined when there is no such volume. */
export async function volumeFolder(name: string): Promise<string | undefined> {
  return (await get<{ Mountpoint: string }>(`/volumes/${encodeURIComponent(name)}`))?.Mountpoint
}

/** All tags of a repository with their image ids. */
export async function tags(repository: string): Promise<{ tag: string; id: string }[]> {
  type Row = { Id: string; RepoTags: string[] | null }
  const images = (await get<Row[]>(`/images/json?filters=${filter({ reference: [repository] })}`)) ?? []
  return images.flatMap((one) =>
    (one.RepoTags ?? [])
      .filter((name) => name.startsWith(`${repository}:`))
      .map((name) => ({ tag: name.slice(repository.length + 1), id: one.Id })),
  )
}

/** Containers of one Compose service, running or not. */
export async function serviceContainers(project: string, service: string): Promise<Container[]> {
  // The last one tells them from what was started by hand: an image that Compose built carries the other two.
  return await labelled([
    `com.docker.compose.project=${project}`,
    `com.docker.compose.service=${service}`,
    'com.docker.compose.oneoff=False',
  ])
}

/** Containers that Compose made, of whichever project, running or not. */
export async function composeContainers(): Promise<Container[]> {
  return await labelled(['com.docker.compose.project', 'com.docker.compose.oneoff=False'])
}

async function labelled(label: string[]): Promise<Container[]> {
  const found = (await get<{ Id: string }[]>(`/containers/json?all=true&filters=${filter({ label })}`)) ?? []
  const containers = await Promise.all(found.map((one) => container(one.Id)))
  return containers.filter((one) => one !== undefined)
}

export interface MountInUse {
  container: string
  id: string
  /** Of Compose. */
  project: string | undefined
  folder: string
  at: string
}

/** Folders of this host that running containers see. */
export async function mountsInUse(): Promise<MountInUse[]> {
  type Mount = { Source?: string; Destination: string }
  type Row = { Id: string; Names: string[]; Labels: Record<string, string> | null; Mounts: Mount[] }
  const rows = (await get<Row[]>('/containers/json')) ?? []
  return rows.flatMap(({ Id, Names, Labels, Mounts }) => {
    const own = {
      container: Names[0]?.slice(1) ?? '',
      id: Id,
      project: Labels?.['com.docker.compose.project'],
    }
    return Mounts.flatMap(({ Source, Destination }) =>
      Source ? [{ ...own, folder: Source, at: Destination }] : [],
    )
  })
}

/** Names of the containers that publish a port of this host. */
export async function publishers(port: string): Promise<string[]> {
  type Row = { Names: string[] }
  const rows = (await get<Row[]>(`/containers/json?filters=${filter({ publish: [port] })}`)) ?? []
  return rows.map((row) => row.Names[0]?.slice(1) ?? '')
}

/** Version of the engine. @throws Error when it does not answer */
export async function version(): Promise<string> {
  const answer = await get<{ Version: string }>('/version')
  return answer?.Version ?? ''
}

/** Root folder of images and containers. */
export async function dataRoot(): Promise<string> {
  const answer = await get<{ DockerRootDir: string }>('/info')
  return answer?.DockerRootDir ?? '/var/lib/docker'
}

async function get<T>(path: string): Promise<T | undefined> {
  try {
    const { status, body } = await getUrl(`http://engine${path}`, { socketPath, timeoutMs: 30_000 })
    if (status === 404) return undefined
    if (status !== 200) throw new Error(`the container engine answered ${status}: ${body.trim()}`)
    return JSON.parse(body) as T
  } catch (error) {
    throw new Error(`the container engine at ${socketPath} does not answer`, { cause: error })
  }
}

function filter(value: Record<string, string[]>): string {
  return encodeURIComponent(JSON.stringify(value))
}
