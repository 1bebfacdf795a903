/** Brings up database servers of the project's own: unprivileged, on 127.0.0.1 only, gone when the process that wanted them is. */
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { randomBytes, randomInt } from 'node:crypto';
import { once } from 'node:events';
import { accessSync, closeSync, constants, existsSync, openSync } from 'node:fs';
import { cp, mkdir, mkdtemp, readFile, realpath, rename, rm, writeFile } from 'node:fs/promises';
import { createServer, type Socket } from 'node:net';
import { tmpdir, userInfo } from 'node:os';
import { delimiter, dirname, join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import mysql, { type RowDataPacket } from 'mysql2/promise';
import {
  cacheDirectory,
  cachedDirectory,
  DebianRootError,
  debianRoot,
  type Progress,
  toStderr,
} from './debian.ts';

export type DatabaseKind = 'mariadb' | 'mysql';

export interface PrivateDatabaseOptions {
  /** Absent: MariaDB, installed or downloaded, or else an installed MySQL. */
  kind?: DatabaseKind | undefined;
  /** Kept by `dispose()`, and taken up again if it holds a database of this kind. Absent: a temporary one. */
  dataDirectory?: string;
  port?: number;
  /** More options for the server; they win over the ones chosen here. */
  args?: string[];
  /** Of the account in `url()`. Absent: random. */
  password?: string;
  progress?: Progress;
}

export interface PrivateDatabase {
  readonly kind: DatabaseKind;
  /** As `SELECT VERSION()` tells it. */
  readonly version: string;
  readonly port: number;
  /** Absent while the server is not running. */
  readonly pid: number | undefined;
  readonly dataDirectory: string;
  /** What the server logged so far. */
  readonly errorLog: string;
  /** For an account that may do everything. */
  url(databaseName?: string): string;
  /** Starts the server again, after `stop()`, `kill()` or a crash: same data, port and account. */
  start(): Promise<void>;
  /** Ends the server as an operator would: it finishes its work first. */
  stop(): Promise<void>;
  /** Ends the server as a power cut would. */
  kill(): Promise<void>;
  /** Stops the server and deletes everything that was made for it. */
  dispose(): Promise<void>;
}

export class PrivateDatabaseError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = 'PrivateDatabaseError';
  }
}

type EndSignal = 'SIGTERM' | 'SIGKILL';

const userName = 'rekey';

/** The slowest start is MySQL's crash recovery on a busy machine. */
const startTimeoutMilliseconds = 90_000;

const stopTimeoutMilliseconds = 60_000;

const startAttempts = 3;

export async function startPrivateDatabase(options: PrivateDatabaseOptions = {}): Promise<PrivateDatabase> {
  const progress = options.progress ?? toStderr;
  const program = await findServer(options.kind, progress);
  const runDirectory = await mkdtemp(join(tmpdir(), 'rekey-database-'));
  try {
    const dataDirectory = resolve(options.dataDirectory ?? join(runDirectory, 'data'));
    await mkdir(temporaryDirectory(runDirectory));
    await createData(program, dataDirectory, runDirectory, progress);
    for (let attempt = 1; ; attempt++) {
      const port = options.port ?? (await freePort());
      const database = privateDatabase(program, { ...options, port, runDirectory, dataDirectory });
      try {
        await database.start();
        progress(
          `${program.kind === 'mysql' ? 'MySQL' : 'MariaDB'} ${database.version} is running on 127.0.0.1:${port}, process ${database.pid}.`,
        );
        return database;
      } catch (error) {
        await database.kill();
        const portTaken =
          error instanceof PrivateDatabaseError && /address already in use/i.test(error.message);
        if (!portTaken || options.port !== undefined || attempt === startAttempts) throw error;
      }
    }
  } catch (error) {
    await rm(runDirectory, { recursive: true, force: true });
    throw error;
  }
}

function privateDatabase(
  program: ServerProgram,
  {
    port,
    runDirectory,
    dataDirectory,
    args = [],
    password = randomBytes(16).toString('hex'),
  }: PrivateDatabaseOptions & { port: number; runDirectory: string; dataDirectory: string },
): PrivateDatabase {
  const errorLog = join(runDirectory, 'error.log');
  // Data that is about to be deleted need not be brought in order first.
  const lastSignal: EndSignal = dirname(dataDirectory) === runDirectory ? 'SIGKILL' : 'SIGTERM';
  let version = program.version;
  let running: { process: ChildProcess; watchdog: ChildProcess } | undefined;

  const url = (databaseName = '') =>
    `mysql://${userName}:${encodeURIComponent(password)}@127.0.0.1:${port}/${databaseName}`;

  async function start(): Promise<void> {
    if (running)
      throw new PrivateDatabaseError(
        `The server on port ${port} is running already (process ${running.process.pid}).`,
      );
    const accountStatements = join(runDirectory, 'account.sql');
    await writeFile(accountStatements, accountSql(password), { mode: 0o600 });
    // What a killed server left would stop the next one if another process has got its number by now.
    await rm(join(dataDirectory, socketName), { force: true });
    await rm(join(dataDirectory, `${socketName}.lock`), { force: true });

    const log = openSync(errorLog, 'a', 0o600);
    const [file = '', ...fixed] = program.server;
    const child = spawn(
      file,
      [
        ...fixed,
        ...serverOptions(program.kind),
        `--datadir=${dataDirectory}`,
        `--port=${port}`,
        `--init-file=${accountStatements}`,
        `--tmpdir=${temporaryDirectory(runDirectory)}`,
        ...args,
      ],
      // A session of its own: Ctrl-C at the terminal is for the parent, which then ends the server in good order.
      {
        cwd: dataDirectory,
        env: { ...process.env, ...program.env },
        stdio: ['ignore', log, log],
        detached: true,
      },
    );
    closeSync(log);
    await once(child, 'spawn');
    child.unref();
    const started = { process: child, watchdog: watch(child, runDirectory, lastSignal) };
    running = started;
    child.once('exit', () => {
      started.watchdog.kill('SIGKILL');
      if (running === started) running = undefined;
    });
    version = await whenReady(url(), child, errorLog);
  }

  async function end(signal: EndSignal): Promise<void> {
    if (!running) return;
    const child = running.process;
    child.ref();
    const exit = once(child, 'exit');
    child.kill(signal);
    const ended = await Promise.race([
      exit.then(() => true),
      sleep(stopTimeoutMilliseconds, false, { ref: false }),
    ]);
    if (ended) return;
    child.kill('SIGKILL');
    await exit;
    throw new PrivateDatabaseError(
      `The server did not stop within ${stopTimeoutMilliseconds / 1000} s and was killed.\n${await tail(errorLog)}`,
    );
  }

  return {
    kind: program.kind,
    get version() {
      return version;
    },
    port,
    get pid() {
      return running?.process.pid;
    },
    dataDirectory,
    errorLog,
    url,
    start,
    stop: () => end('SIGTERM'),
    kill: () => end('SIGKILL'),
    async dispose() {
      await end(lastSignal);
      await rm(runDirectory, { recursive: true, force: true });
    },
  };
}

/**
 * Ends the server and deletes its directory when this process is gone, however it went: the system closes the pipe that
 * the watchdog reads from.
 */
function watch(server: ChildProcess, runDirectory: string, signal: EndSignal): ChildProcess {
  const script = `
    read -r _
    kill -s "$3" "$1" 2>/dev/null
    tries=0
    while kill -0 "$1" 2>/dev/null && [ $tries -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
    kill -KILL "$1" 2>/dev/null && sleep 0.5
    rm -rf -- "$2"`;
  const watchdog = spawn(
    '/bin/sh',
    ['-c', script, 'sh', String(server.pid), runDirectory, signal.slice('SIG'.length)],
    {
      stdio: ['pipe', 'ignore', 'ignore'],
      detached: true,
    },
  );
  watchdog.unref();
  (watchdog.stdin as Socket).unref();
  return watchdog;
}

/** Relative to the data directory, so that no path is too long for a socket (107 characters on Linux). */
const socketName = 'server.sock';

const commonOptions = [
  '--bind-address=127.0.0.1',
  '--skip-name-resolve',
  `--socket=${socketName}`,
  '--pid-file=server.pid',
  '--innodb-buffer-pool-size=32M',
  '--innodb-flush-log-at-trx-commit=1',
  '--key-buffer-size=1M',
];

const kindOptions: Record<DatabaseKind, string[]> = {
  mariadb: ['--innodb-log-file-size=16M', '--aria-pagecache-buffer-size=1M'],
  mysql: [
    '--innodb-redo-log-capacity=16M',
    '--performance-schema=OFF',
    '--mysqlx=OFF',
    '--secure-file-priv=NULL',
  ],
};

function serverOptions(kind: DatabaseKind): string[] {
  return [...asRootOptions(), ...commonOptions, ...kindOptions[kind]];
}

function asRootOptions(): string[] {
  return process.getuid?.() === 0 ? ['--user=root'] : [];
}

/** Runs at each start before the first connection is taken, so that no account without a password can be reached over TCP. */
function accountSql(password: string): string {
  const account = `'${userName}'@'127.0.0.1'`;
  return [
    'SET SESSION sql_log_bin = 0;',
    `CREATE USER IF NOT EXISTS ${account};`,
    `ALTER USER ${account} IDENTIFIED BY '${password.replace(/['\\]/g, '\\$&')}';`,
    `GRANT ALL PRIVILEGES ON *.* TO ${account} WITH GRANT OPTION;`,
    '',
  ].join('\n');
}

async function whenReady(url: string, server: ChildProcess, errorLog: string): Promise<string> {
  const deadline = Date.now() + startTimeoutMilliseconds;
  for (;;) {
    if (server.exitCode !== null || server.signalCode !== null) {
      throw new PrivateDatabaseError(
        `The database server ended while starting (${server.signalCode ?? `exit code ${server.exitCode}`}).\n${await tail(errorLog)}`,
      );
    }
    try {
      const connection = await mysql.createConnection({ uri: url, connectTimeout: 5000 });
      try {
        const [[row]] = await connection.query<RowDataPacket[]>('SELECT VERSION() AS version');
        return String(row?.version);
      } finally {
        connection.destroy();
      }
    } catch (error) {
      if (Date.now() > deadline) {
        throw new PrivateDatabaseError(
          `The database server took no connection within ${startTimeoutMilliseconds / 1000} s.\n${await tail(errorLog)}`,
          { cause: error },
        );
      }
      await sleep(50);
    }
  }
}

const tailLines = 20;

async function tail(errorLog: string): Promise<string> {
  const text = await readFile(errorLog, 'utf8').catch(() => '');
  return `The end of its log:\n${text.trimEnd().split('\n').slice(-tailLines).join('\n')}`;
}

/** Below the ports that Linux, macOS and others give to outgoing connections: none of those can take it between a kill and a restart. */
const portRange = { min: 15_000, max: 32_000 };

export async function freePort(): Promise<number> {
  for (;;) {
    const port = randomInt(portRange.min, portRange.max);
    const server = createServer();
    try {
      await new Promise<void>((done, fail) => {
        server.once('error', fail).listen({ host: '127.0.0.1', port, exclusive: true }, done);
      });
      return port;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EADDRINUSE') throw error;
    } finally {
      server.close();
    }
  }
}

interface ServerProgram {
  kind: DatabaseKind;
  version: string;
  /** Command lines without the options that every start has. */
  server: string[];
  initialise: string[];
  env: Record<string, string>;
}

async function findServer(kind: DatabaseKind | undefined, progress: Progress): Promise<ServerProgram> {
  const wanted = kind ?? 'mariadb';
  try {
    return (await installedServer(wanted)) ?? (await downloadedServer(wanted, progress));
  } catch (error) {
    if (!(error instanceof DebianRootError)) throw error;
    const other = kind === undefined ? await installedServer('mysql') : undefined;
    if (other) return other;
    throw new PrivateDatabaseError(
      `No ${wanted} server is installed and none can be fetched. Install one (the package is called mariadb-server or mysql-server` +
        ` on most systems), or set REKEY_DATABASE_URL to a server you have.\n${error.message}`,
      { cause: error },
    );
  }
}

async function installedServer(kind: DatabaseKind): Promise<ServerProgram | undefined> {
  for (const server of executables(kind === 'mariadb' ? ['mariadbd', 'mysqld'] : ['mysqld'])) {
    const version = await serverVersion([server], {});
    if (version === undefined || version.includes('MariaDB') !== (kind === 'mariadb')) continue;
    if (kind === 'mysql') return mysqlProgram(version, [server, '--no-defaults'], {});
    const base = dirname(dirname(await realpath(server)));
    const initialise = executables(
      ['mariadb-install-db', 'mysql_install_db'],
      [join(base, 'bin'), join(base, 'scripts')],
    )[0];
    if (initialise)
      return mariadbProgram(version, [server, '--no-defaults'], [initialise, '--no-defaults'], {});
  }
  return undefined;
}

async function downloadedServer(kind: DatabaseKind, progress: Progress): Promise<ServerProgram> {
  const root = await debianRoot(
    kind === 'mariadb'
      ? { name: 'mariadb', packages: ['mariadb-server-core', 'mariadb-client-core'] }
      : { name: 'mysql', packages: ['mysql-server-core'], suite: 'sid' },
    progress,
  );
  const base = join(root.directory, 'usr');
  const command = root.command(kind === 'mariadb' ? 'usr/sbin/mariadbd' : 'usr/sbin/mysqld');
  const version = await serverVersion(command, root.env);
  if (version === undefined) {
    throw new PrivateDatabaseError(
      `The downloaded server in ${root.directory} does not run: delete that directory and try again.`,
    );
  }
  if (kind === 'mariadb') {
    const initialise = [...root.command('usr/bin/mariadb-install-db'), '--no-defaults', `--basedir=${base}`];
    return mariadbProgram(version, [...command, '--no-defaults', `--basedir=${base}`], initialise, root.env);
  }
  const places = [
    `--basedir=${base}`,
    `--lc-messages-dir=${base}/share/mysql`,
    `--plugin-dir=${base}/lib/mysql/plugin`,
  ];
  return mysqlProgram(version, [...command, '--no-defaults', ...places], root.env);
}

function mariadbProgram(
  version: string,
  server: string[],
  initialise: string[],
  env: Record<string, string>,
): ServerProgram {
  // This way of authenticating leaves neither an account without a password nor an anonymous one.
  const accounts = [
    '--auth-root-authentication-method=socket',
    `--auth-root-socket-user=${userInfo().username}`,
    '--skip-test-db',
  ];
  // Without --force it insists on looking up the host's name.
  return {
    kind: 'mariadb',
    version,
    server,
    initialise: [...initialise, ...accounts, '--force', '--innodb-log-file-size=16M'],
    env,
  };
}

function mysqlProgram(version: string, server: string[], env: Record<string, string>): ServerProgram {
  return {
    kind: 'mysql',
    version,
    server,
    initialise: [...server, '--initialize-insecure', '--innodb-redo-log-capacity=16M'],
    env,
  };
}

async function serverVersion(command: string[], env: Record<string, string>): Promise<string | undefined> {
  const [file = '', ...args] = command;
  const printed = await promisify(execFile)(file, [...args, '--no-defaults', '--version'], {
    env: { ...process.env, ...env },
  }).catch(() => undefined);
  return printed && /Ver (\S+)/.exec(printed.stdout)?.[1];
}

/** Packages put servers where only root's PATH leads, and installers into folders of their own. */
const usualDirectories = [
  '/usr/sbin',
  '/usr/local/sbin',
  '/usr/local/bin',
  '/usr/local/mysql/bin',
  '/usr/libexec',
  '/opt/homebrew/bin',
];

function executables(names: string[], first: string[] = []): string[] {
  const directories = [
    ...first,
    ...(process.env.PATH ?? '').split(delimiter).filter(Boolean),
    ...usualDirectories,
  ];
  return names.flatMap((name) => directories.map((directory) => join(directory, name)).filter(isExecutable));
}

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

/** MariaDB deletes other servers' temporary tables from the directory for temporary files when it starts. */
function temporaryDirectory(runDirectory: string): string {
  return join(runDirectory, 'tmp');
}

/** Initialising takes seconds, copying what an earlier start initialised a fraction of one. */
async function createData(
  program: ServerProgram,
  dataDirectory: string,
  runDirectory: string,
  progress: Progress,
): Promise<void> {
  if (existsSync(join(dataDirectory, 'ibdata1'))) return;
  const name = `${program.kind}-${program.version}-${userInfo().uid}`.replace(/[^\w.+-]/g, '_');
  const template = join(cacheDirectory, 'databases', name);
  await cachedDirectory(template, async (partial) => {
    progress(`Initialising ${program.kind} ${program.version} …`);
    await initialise(program, partial, runDirectory);
  });
  const partial = `${dataDirectory}.partial-${process.pid}`;
  try {
    await mkdir(dirname(dataDirectory), { recursive: true });
    await cp(template, partial, { recursive: true });
    await rename(partial, dataDirectory);
  } catch (error) {
    await rm(partial, { recursive: true, force: true });
    throw new PrivateDatabaseError(
      `Cannot create a database in ${dataDirectory}: it must be writable, and empty or absent.`,
      { cause: error },
    );
  }
}

async function initialise(
  { initialise: [file = '', ...args], env }: ServerProgram,
  dataDirectory: string,
  runDirectory: string,
): Promise<void> {
  const places = [`--datadir=${dataDirectory}`, `--tmpdir=${temporaryDirectory(runDirectory)}`];
  try {
    await promisify(execFile)(file, [...args, ...asRootOptions(), ...places], {
      env: { ...process.env, ...env },
      cwd: dataDirectory,
    });
  } catch (error) {
    const { stdout = '', stderr = '' } = error as { stdout?: string; stderr?: string };
    throw new PrivateDatabaseError(`Could not initialise a data directory.\n${stdout}${stderr}`);
  }
  // Holds the server's UUID, which each copy needs an own one of.
  await rm(join(dataDirectory, 'auto.cnf'), { force: true });
}

export interface TestDatabase {
  url: string;
  drop(): Promise<void>;
}

/** How the test run's set-up tells the test files' processes which server they share. */
export const sharedServerVariable = 'REKEY_TEST_DATABASE_URL';

/** A new, empty database on the test run's server, on the one that REKEY_DATABASE_URL names, or else on one of this process's own. */
export async function createTestDatabase(): Promise<TestDatabase> {
  const server =
    process.env[sharedServerVariable] ?? process.env.REKEY_DATABASE_URL ?? (await ownServer()).url();
  const name = `rekey_test_${randomBytes(8).toString('hex')}`;
  const admin = new URL(server);
  admin.pathname = '/';
  const database = new URL(server);
  database.pathname = `/${name}`;
  await execute(admin.href, `CREATE DATABASE ${name} CHARACTER SET utf8mb4`);
  return { url: database.href, drop: () => execute(admin.href, `DROP DATABASE IF EXISTS ${name}`) };
}

let ownServerStarting: Promise<PrivateDatabase> | undefined;

function ownServer(): Promise<PrivateDatabase> {
  ownServerStarting ??= startPrivateDatabase({ kind: testDatabaseKind() });
  return ownServerStarting;
}

/** The kind of server that REKEY_TEST_DATABASE asks for. */
export function testDatabaseKind(): DatabaseKind {
  return parseKind(process.env.REKEY_TEST_DATABASE || 'mariadb', 'REKEY_TEST_DATABASE');
}

function parseKind(value: string, source: string): DatabaseKind {
  if (value === 'mariadb' || value === 'mysql') return value;
  throw new PrivateDatabaseError(`${source} must be "mariadb" or "mysql", not "${value}".`);
}

async function execute(url: string, statement: string): Promise<void> {
  const connection = await mysql.createConnection({ uri: url });
  try {
    await connection.query(statement);
  } finally {
    await connection.end();
  }
}

async function main(argument: string | undefined): Promise<void> {
  const database = await startPrivateDatabase({
    kind: argument === undefined ? undefined : parseKind(argument, 'The argument'),
  });
  await execute(database.url(), 'CREATE DATABASE rekey CHARACTER SET utf8mb4');
  console.log(`REKEY_DATABASE_URL=${database.url('rekey')}`);
  toStderr('Press Ctrl-C to stop and delete it.');
  const keepAlive = setInterval(() => {}, 2 ** 30);
  await Promise.race([once(process, 'SIGINT'), once(process, 'SIGTERM')]);
  clearInterval(keepAlive);
  await database.dispose();
}

if (import.meta.main) {
  await main(process.argv[2]).catch((error: unknown) => {
    if (!(error instanceof PrivateDatabaseError || error instanceof DebianRootError)) throw error;
    toStderr(error.message);
    process.exitCode = 1;
  });
}
