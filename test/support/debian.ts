/** Runs programs out of Debian or Ubuntu packages that are not installed, without root: nothing outside the checkout changes. */
import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import {
  chmod,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { promisify } from 'node:util';

export type Progress = (line: string) => void;

export interface DebianRootOptions {
  /** Folder under `.cache/debian/`. */
  name: string;
  packages: string[];
  /** A suite other than the machine's own, such as `sid`; implies `selfContained`. */
  suite?: string;
  /** Brings everything down to libc along, instead of only what this machine lacks. */
  selfContained?: boolean;
}

export interface DebianRoot {
  directory: string;
  /** The command line that runs a program of the root, named by its path in there: `usr/sbin/mariadbd`. */
  command(program: string): string[];
  /** What has to be added to `process.env` for that command. */
  env: Record<string, string>;
}

export type DebianRootErrorCode =
  | 'APT_MISSING'
  | 'NETWORK_UNAVAILABLE'
  | 'SUITE_NOT_FOUND'
  | 'PACKAGE_NOT_FOUND'
  | 'CACHE_NOT_WRITABLE'
  | 'APT_FAILED';

/** Its message says what the person at the terminal can do about it. */
export class DebianRootError extends Error {
  readonly code: DebianRootErrorCode;

  constructor(code: DebianRootErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = 'DebianRootError';
    this.code = code;
  }
}

export const cacheDirectory = join(import.meta.dirname, '..', '..', '.cache');

export const toStderr: Progress = (line) => void process.stderr.write(`${line}\n`);

/**
 * Downloads and unpacks the packages unless an earlier call did. The root is kept until `.cache/debian` is deleted, and
 * is made anew when the packages, the suite or the machine's release differ.
 */
export async function debianRoot(
  options: DebianRootOptions,
  progress: Progress = toStderr,
): Promise<DebianRoot> {
  const selfContained = options.selfContained === true || options.suite !== undefined;
  const release = await readFile('/etc/os-release', 'utf8').catch(() => '');
  const key = createHash('sha256')
    .update(JSON.stringify([options.packages, options.suite, selfContained, process.arch, release]))
    .digest('hex')
    .slice(0, 12);
  const directory = join(cacheDirectory, 'debian', options.name, key);
  await cachedDirectory(directory, (partial) => fillRoot(partial, { ...options, selfContained }, progress));
  return rootAt(directory, selfContained);
}

/**
 * Fills a directory once. It appears under its name only when it is complete; of several processes that fill it at the same
 * time the first to finish wins, and the others use what it made.
 */
export async function cachedDirectory(
  directory: string,
  fill: (partial: string) => Promise<void>,
): Promise<void> {
  if (existsSync(directory)) return;
  const parent = dirname(directory);
  let partial: string;
  try {
    await mkdir(parent, { recursive: true });
    await removeAbandoned(parent);
    partial = await mkdtemp(`${directory}${partialSuffix}`);
  } catch (error) {
    throw new DebianRootError(
      'CACHE_NOT_WRITABLE',
      `Cannot write to ${parent}: make it writable for you, or work in a checkout of your own.`,
      { cause: error },
    );
  }
  try {
    await fill(partial);
    await rename(partial, directory).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'ENOTEMPTY' && error.code !== 'EEXIST') throw error;
    });
  } finally {
    await rm(partial, { recursive: true, force: true });
  }
}

const partialSuffix = '.partial-';

/** Far above what the slowest download should take, so that nothing still being filled is taken away. */
const abandonedAfterMilliseconds = 6 * 60 * 60 * 1000;

async function removeAbandoned(parent: string): Promise<void> {
  for (const name of await readdir(parent)) {
    if (!name.includes(partialSuffix)) continue;
    const path = join(parent, name);
    const modified = await stat(path).then(
      (status) => status.mtimeMs,
      () => Date.now(),
    );
    if (Date.now() - modified > abandonedAfterMilliseconds) await rm(path, { recursive: true, force: true });
  }
}

async function rootAt(directory: string, selfContained: boolean): Promise<DebianRoot> {
  const libraries = join(directory, 'usr', 'lib');
  const multiarch = (await readdir(libraries))
    .filter((name) => name.includes('-linux-gnu'))
    .map((name) => join(libraries, name));
  const libraryPath = [...multiarch, libraries].join(':');
  if (!selfContained) {
    const inherited = process.env.LD_LIBRARY_PATH;
    return {
      directory,
      command: (program) => [join(directory, program)],
      env: { LD_LIBRARY_PATH: inherited ? `${libraryPath}:${inherited}` : libraryPath },
    };
  }
  // The root's programs need its own libc, and a libc works only with the loader that was built with it.
  const loader = await findLoader(multiarch);
  return {
    directory,
    command: (program) => [loader, '--library-path', libraryPath, join(directory, program)],
    env: {},
  };
}

async function findLoader(directories: string[]): Promise<string> {
  for (const directory of directories) {
    const name = (await readdir(directory)).find((file) => /^ld-linux.*\.so\.\d+$/.test(file));
    if (name) return join(directory, name);
  }
  throw new DebianRootError(
    'APT_FAILED',
    `No program loader in ${directories.join(', ')}: delete that root and try again.`,
  );
}

async function fillRoot(root: string, options: DebianRootOptions, progress: Progress): Promise<void> {
  const apt = join(root, '.apt');
  await mkdir(join(apt, 'lists', 'partial'), { recursive: true });
  await mkdir(join(apt, 'cache', 'archives', 'partial'), { recursive: true });
  await writeFile(join(apt, 'status'), '');
  const sources = options.suite ? await sourcesOfSuite(options.suite) : undefined;
  if (sources) {
    await mkdir(join(apt, 'sources'));
    await writeFile(join(apt, 'sources', 'suite.sources'), sources);
  }
  await writeFile(join(apt, 'apt.conf'), aptConfiguration(apt, options));

  await download(apt, options, progress);
  await unpack(join(apt, 'cache', 'archives'), root);
  await rm(apt, { recursive: true });
  await chmod(root, 0o755);
}

function aptConfiguration(apt: string, options: DebianRootOptions): string {
  return [
    `Dir::State "${apt}";`,
    `Dir::State::Lists "${apt}/lists";`,
    `Dir::Cache "${apt}/cache";`,
    ...(options.selfContained
      ? [
          `Dir::State::status "${apt}/status";`,
          'Dir::Etc::Preferences "/dev/null";',
          'Dir::Etc::PreferencesParts "/dev/null";',
        ]
      : []),
    ...(options.suite
      ? ['Dir::Etc::SourceList "/dev/null";', `Dir::Etc::SourceParts "${apt}/sources";`]
      : []),
    'Debug::NoLocking "true";',
    // As root, apt would download as a user who cannot reach this directory.
    'APT::Sandbox::User "root";',
    'Acquire::Languages "none";',
    'Acquire::Retries "3";',
    // The machine's hooks tidy up the system's own apt state.
    '#clear APT::Update::Post-Invoke;',
    '#clear APT::Update::Post-Invoke-Success;',
    '',
  ].join('\n');
}

async function download(
  apt: string,
  { packages, suite }: DebianRootOptions,
  progress: Progress,
): Promise<void> {
  const configuration = `-c=${join(apt, 'apt.conf')}`;
  // A third party's broken source fails the update without being in the way: what counts is whether the packages are found.
  const update = await run('apt-get', [configuration, 'update']);
  const lists = (await readdir(join(apt, 'lists'))).filter((name) => name.includes('Packages'));
  if (lists.length === 0) {
    if (suite && /404|does not have a Release file/.test(update.output)) {
      throw new DebianRootError(
        'SUITE_NOT_FOUND',
        `The servers of this machine's apt sources have no suite "${suite}".\n${update.output}`,
      );
    }
    throw new DebianRootError(
      'NETWORK_UNAVAILABLE',
      `apt-get could not read any package list: check the network, the proxy and the machine's apt sources.\n${update.output}`,
    );
  }

  const install = ['-y', '--no-install-recommends', '--reinstall', 'install', ...packages];
  const plan = await run('apt-get', [configuration, '--print-uris', '-qq', ...install]);
  if (plan.failed) {
    const missing = /Unable to locate package|has no installation candidate|Couldn't find any package/.test(
      plan.output,
    );
    throw new DebianRootError(
      missing ? 'PACKAGE_NOT_FOUND' : 'APT_FAILED',
      `apt-get cannot provide ${packages.join(', ')} from ${suite ? `the suite "${suite}"` : "this machine's apt sources"}.\n${plan.output}`,
    );
  }
  const sizes = [...plan.output.matchAll(/^'[^']+' \S+ (\d+)/gm)].map((match) => Number(match[1]));
  const megabytes = sizes.reduce((sum, size) => sum + size, 0) / 1e6;
  progress(`Downloading ${packages.join(', ')} (${sizes.length} packages, ${megabytes.toFixed(1)} MB) …`);
  const fetched = await run('apt-get', [configuration, '-qq', '--download-only', ...install]);
  if (fetched.failed) {
    throw new DebianRootError(
      'NETWORK_UNAVAILABLE',
      `apt-get could not download ${packages.join(', ')}: try again.\n${fetched.output}`,
    );
  }
}

/** Documentation and translations, half of the files, are of no use to a program that is only run. */
const notUnpacked = ['./usr/share/doc', './usr/share/man', './usr/share/locale', './usr/share/info'];

/** Old packages hold `/lib`, new ones `/usr/lib`: as on a merged system, both names lead to the same place. */
const mergedDirectories = ['bin', 'sbin', 'lib', 'lib64'];

async function unpack(archives: string, root: string): Promise<void> {
  for (const name of mergedDirectories) {
    await mkdir(join(root, 'usr', name), { recursive: true });
    await symlink(join('usr', name), join(root, name));
  }
  const packages = (await readdir(archives))
    .filter((name) => name.endsWith('.deb'))
    .map((name) => join(archives, name));
  // No ownership and no set-user-ID bits: those would be the running user's, root's perhaps.
  const tarOptions = [
    '--keep-directory-symlink',
    '--no-same-owner',
    '--no-same-permissions',
    ...notUnpacked.map((path) => `--exclude=${path}`),
  ];
  for (const file of packages) {
    const script = 'file=$1; shift; dpkg-deb --fsys-tarfile "$file" | tar -x "$@"';
    const unpacked = await run('sh', ['-c', script, 'sh', file, '-C', root, ...tarOptions]);
    if (unpacked.failed)
      throw new DebianRootError(
        'APT_FAILED',
        `Could not unpack ${basename(file)}: is the disk full?\n${unpacked.output}`,
      );
  }
}

/** The deb822 text of sources for another suite at the places where this machine gets its own release from. */
async function sourcesOfSuite(suite: string): Promise<string> {
  const release = await readFile('/etc/os-release', 'utf8').catch(() => '');
  const codename = /^VERSION_CODENAME="?(\w+)/m.exec(release)?.[1];
  const own = (await aptSources()).filter(
    (source) =>
      source.components.includes('main') &&
      source.suites.some((name) => name === codename || rollingSuites.includes(name)),
  );
  if (own.length === 0) {
    throw new DebianRootError(
      'SUITE_NOT_FOUND',
      `None of this machine's apt sources serves its own release (${codename ?? 'unknown'}), so there is no place to get the suite "${suite}" from.`,
    );
  }
  return own
    .map((source) =>
      [
        'Types: deb',
        `URIs: ${source.uris.join(' ')}`,
        `Suites: ${suite}`,
        'Components: main',
        ...(source.signedBy ? [`Signed-By: ${source.signedBy}`] : []),
        '',
      ].join('\n'),
    )
    .join('\n');
}

const rollingSuites = ['oldstable', 'stable', 'testing', 'unstable', 'sid'];

interface AptSource {
  uris: string[];
  suites: string[];
  components: string[];
  /** A keyring's path or, over several lines, a key. */
  signedBy: string | undefined;
}

async function aptSources(): Promise<AptSource[]> {
  const parts = '/etc/apt/sources.list.d';
  const names = await readdir(parts).catch(() => []);
  const files = ['/etc/apt/sources.list', ...names.map((name) => join(parts, name))];
  const sources: AptSource[] = [];
  for (const file of files) {
    const text = await readFile(file, 'utf8').catch(() => '');
    if (file.endsWith('.sources')) sources.push(...parseStanzas(text));
    else if (file.endsWith('.list')) sources.push(...parseLines(text));
  }
  return sources;
}

/** The format of `.sources` files: https://manpages.debian.org/sources.list#DEB822-STYLE_FORMAT */
export function parseStanzas(text: string): AptSource[] {
  const withoutComments = text.replace(/^#.*\n?/gm, '');
  return withoutComments.split(/\n[ \t]*\n/).flatMap((stanza) => {
    const fields = new Map<string, string>();
    for (const [, name, value] of stanza.matchAll(/^([\w-]+):[ \t]*(.*(?:\n[ \t]+.*)*)/gm)) {
      if (name !== undefined && value !== undefined) fields.set(name.toLowerCase(), value);
    }
    const words = (name: string) => (fields.get(name) ?? '').split(/\s+/).filter(Boolean);
    if (!words('types').includes('deb') || fields.get('enabled')?.trim() === 'no') return [];
    return [
      {
        uris: words('uris'),
        suites: words('suites'),
        components: words('components'),
        signedBy: fields.get('signed-by'),
      },
    ];
  });
}

/** The format of `.list` files: https://manpages.debian.org/sources.list#ONE-LINE-STYLE_FORMAT */
export function parseLines(text: string): AptSource[] {
  return [...text.matchAll(/^[ \t]*deb[ \t]+(?:\[([^\]]*)\][ \t]+)?(\S+)[ \t]+(\S+)([^#\n]*)/gm)].map(
    ([, options = '', uri = '', suite = '', components = '']) => ({
      uris: [uri],
      suites: [suite],
      components: components.split(/\s+/).filter(Boolean),
      signedBy: /signed-by=(\S+)/i.exec(options)?.[1],
    }),
  );
}

const outputLimitBytes = 16 * 1024 * 1024;

async function run(program: string, args: string[]): Promise<{ failed: boolean; output: string }> {
  try {
    const { stdout, stderr } = await promisify(execFile)(program, args, {
      env: { ...process.env, LC_ALL: 'C' },
      maxBuffer: outputLimitBytes,
    });
    return { failed: false, output: stdout + stderr };
  } catch (error) {
    const failure = error as NodeJS.ErrnoException & { stdout?: string; stderr?: string };
    if (failure.code === 'ENOENT') {
      throw new DebianRootError(
        'APT_MISSING',
        `${program} is not on this machine: packages can be fetched on Debian and Ubuntu only.`,
      );
    }
    return { failed: true, output: `${failure.stdout ?? ''}${failure.stderr ?? ''}` || failure.message };
  }
}
