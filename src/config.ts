import { readFileSync } from 'node:fs';
import { BlockList, isIP } from 'node:net';
import { availableParallelism } from 'node:os';
import { parse as parseToml, TomlError } from 'smol-toml';
import { z } from 'zod';

/**
 * The configuration: one TOML file and the environment, checked as a whole, so that an operator sees all that
 * is wrong at once. Every key has a variable: `policy.min_length` is `REKEY_POLICY_MIN_LENGTH`. The environment
 * wins over the file. `rekey.example.toml` explains every key.
 */

const MS = 1000;
const DAYS_MAX = 36_500;

const int = (min: number, max: number, fallback: number) =>
  z
    .int(`must be a whole number from ${min} to ${max}`)
    .min(min, `must be ${min} to ${max}`)
    .max(max, `must be ${min} to ${max}`)
    .default(fallback);
const flag = (fallback: boolean) => z.boolean('must be true or false').default(fallback);
const text = (fallback: string) => z.string('must be a string').default(fallback);
const list = () => z.array(z.string('must be a list of strings').min(1, 'must not hold an empty entry'));
const section = <S extends z.ZodRawShape>(shape: S) => z.strictObject(shape).prefault({} as never);

const HOST_PORT = /^(\[[0-9a-fA-F:.]+\]|[^\s:[\]]+):(\d{1,5})$/;
const hostPort = z
  .string('must be host:port')
  .refine((value) => Number(HOST_PORT.exec(value)?.[2] ?? Number.NaN) <= 65_535, 'must be host:port');

/** `10.0.0.0/8`, `192.0.2.7`, `2001:db8::/32`. */
export function parseNetwork(
  value: string,
): { address: string; prefix: number; family: 'ipv4' | 'ipv6' } | undefined {
  const [address = '', prefix, ...rest] = value.split('/');
  const version = isIP(address);
  const bits = version === 4 ? 32 : 128;
  if (version === 0 || rest.length > 0 || (prefix !== undefined && !/^\d{1,3}$/.test(prefix)))
    return undefined;
  const length = prefix === undefined ? bits : Number(prefix);
  if (length > bits) return undefined;
  return { address, prefix: length, family: version === 4 ? 'ipv4' : 'ipv6' };
}

const schema = z.strictObject({
  listen: hostPort.default('127.0.0.1:50051'),
  apps: list().min(1, 'must name at least one application, e.g. REKEY_APPS=CRM,ERP').prefault([]),
  trusted_peers: list()
    .refine((values) => values.every(parseNetwork), 'must hold addresses or networks such as 10.0.0.0/8')
    .default([]),
  reflection: flag(true),
  log_level: z.enum(['trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent']).default('info'),
  log_format: z.enum(['auto', 'json', 'pretty']).default('auto'),
  metrics_listen: z.union([z.literal(''), hostPort], 'must be host:port, or empty for none').default(''),
  tls: section({
    certificate_file: text(''),
    key_file: text(''),
    client_ca_file: text(''),
    plaintext: flag(false),
  }),
  database: section({
    url: z
      .string('must be mysql://user:password@host:port/name')
      .default('')
      .refine(isDatabaseUrl, 'must be mysql://user:password@host:port/name'),
    ca_file: text(''),
    pool_size: int(1, 1000, 10),
    connect_timeout_ms: int(100, 60_000, 3 * MS),
    statement_timeout_ms: int(100, 60_000, 5 * MS),
    lock_wait_timeout_seconds: int(1, 60, 3),
  }),
  session: section({ lifetime_seconds: int(60, 31_536_000, 8 * 3600) }),
  policy: section({
    min_length: int(1, 1024, 8),
    max_length: int(64, 1024, 256),
    min_complexity: int(0, 4, 3),
    reject: list().default([]),
    reject_file: text(''),
    reject_common: flag(true),
    reject_user_info: flag(true),
    reject_same_as_old: flag(true),
    expiry_days: int(0, DAYS_MAX, 730),
    expiry_warning_days: int(0, DAYS_MAX, 30),
    must_change_after_super_user: flag(false),
  }),
  hash: section({
    engine: z.enum(['auto', 'argon2', 'node-rs']).default('auto'),
    memory_kib: int(8, 4_194_304, 19_456),
    iterations: int(1, 1000, 2),
    parallelism: int(1, 255, 1),
    slots: int(0, 1024, 0),
    queue_length: int(0, 100_000, 1000),
    pepper_keys: list()
      .refine(
        (keys) => keys.every((key) => PEPPER_KEY.test(key)),
        'must hold ID:SECRET entries: an ID of 1 to 32 letters, digits, - or _, and at least 16 bytes as base64',
      )
      .default([]),
    pepper_keys_file: text(''),
    pepper_key_id: text(''),
  }),
  guard: section({
    old_password_attempts: int(1, 100, 10),
    login_attempts: int(1, 100, 10),
    login_attempts_per_address: int(1, 100_000, 100),
    window_seconds: int(1, 86_400, 900),
  }),
  limits: section({
    message_bytes: int(1024, 1_048_576, 16_384),
    metadata_bytes: int(1024, 65_536, 8192),
    streams_per_connection: int(1, 10_000, 100),
    call_timeout_ms: int(100, 600_000, 15 * MS),
    idle_seconds: int(1, 86_400, 30),
    connection_age_seconds: int(1, 86_400, 1800),
    keepalive_seconds: int(1, 7200, 20),
    shutdown_grace_seconds: int(0, 3600, 20),
  }),
  retention: section({
    sweep_seconds: int(1, 86_400, 60),
    idempotency_hours: int(1, 8760, 24),
    session_days: int(0, DAYS_MAX, 30),
    audit_days: int(0, DAYS_MAX, 0),
  }),
});

const PEPPER_KEY = /^[A-Za-z0-9_-]{1,32}:(?=[A-Za-z0-9+/_-]{22,})[A-Za-z0-9+/_-]+={0,2}$/;

function isDatabaseUrl(value: string): boolean {
  if (!URL.canParse(value)) return false;
  const { protocol, hostname, username, password, pathname, search, hash } = new URL(value);
  return (
    protocol === 'mysql:' &&
    hostname !== '' &&
    pathname.length > 1 &&
    // Nothing heeds options here; an operator must not believe that `?ssl-mode=REQUIRED` does something.
    search + hash === '' &&
    isDecodable(username + password + pathname)
  );
}

function isDecodable(value: string): boolean {
  try {
    decodeURIComponent(value);
    return true;
  } catch {
    return false;
  }
}

type Keys = z.infer<typeof schema>;

/** The checked configuration, with the files that it names read in. */
export type Config = Readonly<
  Keys & {
    rejectWords: readonly string[];
    peppers: ReadonlyMap<string, Buffer>;
    tlsFiles: { certificate: Buffer; key: Buffer; clientCa: Buffer | undefined } | undefined;
    databaseCa: Buffer | undefined;
    trustedPeers: BlockList;
    slots: number;
  }
>;

/** Everything that is wrong with the configuration, a line each. */
export class ConfigError extends Error {
  readonly problems: readonly string[];
  constructor(problems: readonly string[]) {
    super(
      `The configuration has ${problems.length === 1 ? 'a mistake' : `${problems.length} mistakes`}:\n  ${problems.join('\n  ')}`,
    );
    this.name = 'ConfigError';
    this.problems = problems;
  }
}

/** Variables with the prefix that are not configuration keys: the command line's own, and the tests'. */
const OTHER_VARIABLES = /^REKEY_(CONFIG|SERVER|UST|APP|CA_FILE|TEST_.*|FAULT_.*|BENCH_.*)$/;

export const configKeys: ReadonlyMap<string, z.ZodType> = new Map(leaves(schema.shape));

/** Reads `path` (if any) and the environment. @throws ConfigError with every problem found. */
export function loadConfig(path: string | undefined, environment: NodeJS.ProcessEnv): Config {
  const problems: string[] = [];
  const tree = path === undefined ? {} : readToml(path, problems);
  overlayEnvironment(tree, environment, problems);

  const parsed = schema.safeParse(tree);
  for (const issue of parsed.error?.issues ?? []) {
    if (issue.code === 'unrecognized_keys') {
      for (const key of issue.keys) problems.push(`${[...issue.path, key].join('.')}: no such key`);
    } else problems.push(`${describeKey(issue.path.map(String))}: ${issue.message}`);
  }
  const config = complete(parsed.data ?? soundPart(tree), problems);
  if (problems.length > 0) throw new ConfigError(problems);
  return Object.freeze(config);
}

/** The tree with defaults in place of what is wrong: enough to find out what else is. */
function soundPart(tree: Tree): Keys {
  const sound: Tree = {};
  for (const [key, type] of configKeys) {
    const path = key.split('.');
    const value = path.reduce<unknown>((branch, name) => (branch as Tree | undefined)?.[name], tree);
    const parsed = type.safeParse(value);
    put(sound, path, parsed.success ? parsed.data : type.safeParse(undefined).data);
  }
  return sound as Keys;
}

/** Checks the keys against each other and reads the files that they name. */
function complete(keys: Keys, problems: string[]): Config {
  const read = (key: string, path: string): Buffer | undefined => {
    if (path === '') return undefined;
    try {
      return readFileSync(path);
    } catch (error) {
      problems.push(
        `${describeKey(key.split('.'))}: cannot read ${path} (${(error as NodeJS.ErrnoException).code})`,
      );
      return Buffer.alloc(0);
    }
  };
  const lines = (buffer: Buffer | undefined) =>
    (buffer?.toString('utf8') ?? '')
      .split('\n')
      .map((line) => line.trim())
      .filter((line) => line !== '' && !line.startsWith('#'));

  if ((keys.tls.certificate_file === '') !== (keys.tls.key_file === '')) {
    const missing = keys.tls.certificate_file === '' ? 'certificate_file' : 'key_file';
    problems.push(`${describeKey(['tls', missing])}: certificate_file and key_file go together`);
  }
  if (keys.tls.client_ca_file !== '' && keys.tls.certificate_file === '') {
    problems.push(`${describeKey(['tls', 'client_ca_file'])}: needs certificate_file and key_file`);
  }
  if (keys.policy.min_length > keys.policy.max_length) {
    problems.push(`${describeKey(['policy', 'min_length'])}: must not exceed max_length`);
  }
  const certificate = read('tls.certificate_file', keys.tls.certificate_file);
  const key = read('tls.key_file', keys.tls.key_file);
  if (certificate === undefined && !keys.tls.plaintext && !isLoopback(keys.listen)) {
    problems.push(
      `${describeKey(['listen'])}: passwords would cross the network unencrypted; set tls.certificate_file and ` +
        'tls.key_file, or tls.plaintext = true where something else encrypts',
    );
  }

  const peppers = new Map<string, Buffer>();
  for (const entry of [
    ...keys.hash.pepper_keys,
    ...lines(read('hash.pepper_keys_file', keys.hash.pepper_keys_file)),
  ]) {
    const [id = '', secret = ''] = entry.split(':');
    if (!PEPPER_KEY.test(entry))
      problems.push(`${describeKey(['hash', 'pepper_keys_file'])}: not an ID:SECRET line`);
    else if (peppers.has(id))
      problems.push(`${describeKey(['hash', 'pepper_keys'])}: ${id} stands there twice`);
    else peppers.set(id, Buffer.from(secret, 'base64'));
  }
  if (keys.hash.pepper_key_id !== '' && !peppers.has(keys.hash.pepper_key_id)) {
    problems.push(`${describeKey(['hash', 'pepper_key_id'])}: none of the pepper keys has this ID`);
  }
  if (keys.hash.memory_kib < 8 * keys.hash.parallelism) {
    problems.push(`${describeKey(['hash', 'memory_kib'])}: must be at least 8 times hash.parallelism`);
  }

  const trustedPeers = new BlockList();
  for (const network of keys.trusted_peers.map(parseNetwork)) {
    if (network) trustedPeers.addSubnet(network.address, network.prefix, network.family);
  }
  return {
    ...keys,
    rejectWords: [...keys.policy.reject, ...lines(read('policy.reject_file', keys.policy.reject_file))],
    peppers,
    tlsFiles:
      certificate && key
        ? { certificate, key, clientCa: read('tls.client_ca_file', keys.tls.client_ca_file) }
        : undefined,
    databaseCa: read('database.ca_file', keys.database.ca_file),
    trustedPeers,
    slots: keys.hash.slots === 0 ? availableParallelism() + 1 : keys.hash.slots,
  };
}

/** Whether `host` or `host:port` is this machine, and nothing of what is sent there crosses a network. */
export function isLoopback(hostPort: string): boolean {
  const host = hostPort.replace(/:\d+$/, '').replace(/^\[|\]$/g, '');
  return host === 'localhost' || host === '::1' || /^127\.\d+\.\d+\.\d+$/.test(host);
}

type Tree = { [key: string]: unknown };

function readToml(path: string, problems: string[]): Tree {
  try {
    return parseToml(readFileSync(path, 'utf8')) as Tree;
  } catch (error) {
    if (error instanceof TomlError)
      problems.push(`${path}, line ${error.line}: ${error.message.split('\n')[0]}`);
    else problems.push(`${path}: cannot be read (${(error as NodeJS.ErrnoException).code ?? 'no text'})`);
    return {};
  }
}

function overlayEnvironment(tree: Tree, environment: NodeJS.ProcessEnv, problems: string[]): void {
  const keyOfVariable = new Map([...configKeys.keys()].map((key) => [variableOf(key), key]));
  for (const [variable, value] of Object.entries(environment)) {
    if (!variable.startsWith('REKEY_') || OTHER_VARIABLES.test(variable) || value === undefined) continue;
    const key = keyOfVariable.get(variable);
    if (key === undefined) {
      problems.push(`${variable}: no such key`);
      continue;
    }
    put(tree, key.split('.'), fromVariable(configKeys.get(key) as z.ZodType, value));
  }
}

function put(tree: Tree, path: readonly string[], value: unknown): void {
  let branch = tree;
  for (const name of path.slice(0, -1)) {
    if (typeof branch[name] !== 'object' || branch[name] === null) branch[name] = {};
    branch = branch[name] as Tree;
  }
  branch[path.at(-1) as string] = value;
}

/** A variable's text in the type that its key wants; what does not fit stays text, for the schema to refuse. */
function fromVariable(type: z.ZodType, value: string): unknown {
  const kind = innerType(type)._zod.def.type;
  if (kind === 'number') return /^-?\d+$/.test(value.trim()) ? Number(value) : value;
  if (kind === 'boolean') return value === 'true' ? true : value === 'false' ? false : value;
  if (kind === 'array')
    return value.split(',').flatMap((entry) => (entry.trim() === '' ? [] : [entry.trim()]));
  return value;
}

function innerType(type: z.ZodType): z.ZodType {
  const { innerType: inner } = type._zod.def as unknown as { innerType?: z.ZodType };
  return inner ? innerType(inner) : type;
}

function leaves(shape: z.ZodRawShape, prefix = ''): [string, z.ZodType][] {
  return Object.entries(shape).flatMap(([name, type]) => {
    const inner = innerType(type as z.ZodType);
    return inner instanceof z.ZodObject
      ? leaves(inner.shape, `${prefix}${name}.`)
      : [[prefix + name, type as z.ZodType] as [string, z.ZodType]];
  });
}

const variableOf = (key: string) => `REKEY_${key.replaceAll('.', '_').toUpperCase()}`;

function describeKey(path: readonly string[]): string {
  const key = path.filter((part) => !/^\d+$/.test(part)).join('.');
  return configKeys.has(key) ? `${key} (${variableOf(key)})` : key;
}
