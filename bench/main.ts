/**
 * `npm run bench`: how near Rekey comes to what hashing alone allows, and how it stands more than that. Brings its
 * own database, data, servers and load client, all on 127.0.0.1; nothing of them is left afterwards but
 * bench/report/.
 */
import { execFileSync } from 'node:child_process';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { availableParallelism, cpus, totalmem } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { type Findings, type Table, toHtml, toText, verdictTable } from './report.ts';
import { SCALES, type Scale, SESSIONS_EACH, smallPopulation } from './scale.ts';
import { measureCheapCalls } from './sections/cheap_calls.ts';
import { measureCost } from './sections/cost.ts';
import { measureGrowth } from './sections/growth.ts';
import { measureOverload } from './sections/overload.ts';
import { measureScaleOut } from './sections/scale_out.ts';
import { measureShare } from './sections/share.ts';
import { rekeyTarget, Stage, warmUp } from './stage.ts';

const USAGE = `npm run bench -- [--quick | --full] [--only section,…] [--users n] [--rounds n]
              [--database mariadb|mysql] [--engine auto|argon2|node-rs]

  --quick      two minutes at most, few rounds: an idea of the figures
  --full       growth at 1,000,000 users with 10,000,000 sessions and audit records; needs 15 GB of disk, 12 GB of memory
  --users      users of the large database, instead
  --rounds     rounds of each measurement, instead
  --only       share, overload, cheap, cost, growth, processes
  --database   the database server; mariadb unless told otherwise
  --engine     what hashes, in Rekey, in better-auth and for the bound; auto unless told otherwise
`;

const SECTIONS = ['share', 'overload', 'cheap', 'cost', 'growth', 'processes'] as const;

const { values } = parseArgs({
  options: {
    quick: { type: 'boolean', default: false },
    full: { type: 'boolean', default: false },
    only: { type: 'string', default: SECTIONS.join() },
    users: { type: 'string' },
    rounds: { type: 'string' },
    database: { type: 'string', default: 'mariadb' },
    engine: { type: 'string', default: 'auto' },
    help: { type: 'boolean', default: false },
  },
});
const sections = new Set(values.only.split(','));
const { database, engine } = values;
const isUnknown = [...sections].some((name) => !SECTIONS.includes(name as (typeof SECTIONS)[number]));
const isDatabase = database === 'mariadb' || database === 'mysql';
const isEngine = engine === 'auto' || engine === 'argon2' || engine === 'node-rs';
if (values.help || isUnknown || !isDatabase || !isEngine) {
  process.stdout.write(USAGE);
  process.exit(values.help ? 0 : 2);
}

const name = values.quick ? 'quick' : values.full ? 'full' : 'usual';
const preset: Scale = SCALES[name];
const scale: Scale = {
  ...preset,
  largeUsers: Number(values.users ?? preset.largeUsers),
  rounds: Number(values.rounds ?? preset.rounds),
  overloadRounds: Number(values.rounds ?? preset.overloadRounds),
};

const start = performance.now();
const progress = (line: string) => {
  const seconds = Math.round((performance.now() - start) / 1000);
  process.stderr.write(`[${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, '0')}] ${line}\n`);
};

const cores = availableParallelism();
const stage = await Stage.set({ database, bufferPool: scale.bufferPool, cores, engine }, progress);
const all: Findings[] = [];
try {
  await run();
} finally {
  await stage.end();
}

async function run(): Promise<void> {
  const main = await stage.fill('main', { users: scale.users, sessionsEach: SESSIONS_EACH });
  const client = await stage.startClient();
  const tell = (findings: Findings) => {
    all.push(findings);
    for (const table of findings.tables) process.stdout.write(toText(table));
  };

  if (sections.has('share') || sections.has('overload') || sections.has('cheap')) {
    const server = await stage.startRekey(main);
    await warmUp(client, rekeyTarget(main, server), [0, scale.users]);
    if (sections.has('share') || sections.has('overload')) {
      const peer = await stage.startPeer(main.population);
      await warmUp(client, peer.target, [0, scale.users]);
      if (sections.has('share'))
        tell(await measureShare(stage, scale, { filled: main, server, client, peer }, progress));
      if (sections.has('overload'))
        tell(await measureOverload(scale, { filled: main, server, client, peer }, progress));
      await peer.end();
    }
    if (sections.has('cheap')) {
      const prober = await stage.startClient();
      tell(await measureCheapCalls(scale, { filled: main, server, client, prober }, progress));
    }
    await server.stop();
  }
  if (sections.has('cost')) tell(await measureCost(stage, scale, { filled: main, client }, progress));
  if (sections.has('processes'))
    tell(await measureScaleOut(stage, scale, { filled: main, client }, progress));
  if (sections.has('growth')) {
    const small = await stage.fill('small', smallPopulation);
    const isLarger = scale.largeUsers !== scale.users;
    const population = { users: scale.largeUsers, sessionsEach: SESSIONS_EACH };
    const large = isLarger ? await stage.fill('large', population) : main;
    tell(await measureGrowth(stage, scale, { small, large, client }, progress));
  }

  const findings: Findings = {
    verdicts: all.flatMap(({ verdicts }) => verdicts),
    tables: all.flatMap(({ tables }) => tables),
    plots: all.flatMap(({ plots }) => plots),
  };
  const machine = await describeMachine();
  process.stdout.write(toText(machine) + toText(verdictTable(findings.verdicts)));
  const directory = join(import.meta.dirname, 'report');
  await mkdir(directory, { recursive: true });
  const file = join(directory, `${name}-${database}${engine === 'auto' ? '' : `-${engine}`}.html`);
  await writeFile(file, toHtml(`Rekey: benchmark (${name})`, machine, findings));
  progress(`written: ${file}`);
}

async function describeMachine(): Promise<Table> {
  const { memoryKib, iterations, parallelism } = stage.parameters;
  return {
    title: 'Machine and versions',
    headings: ['', ''],
    rows: [
      ['when', new Date().toISOString()],
      ['processor', `${cpus()[0]?.model ?? 'unknown'}, ${cores} cores`],
      ['memory', `${(totalmem() / 1e9).toFixed(0)} GB`],
      ['system', `${process.platform} ${process.arch}`],
      ['commit', commit()],
      ['Node', process.version],
      ['database', `${stage.database.version}, buffer pool ${scale.bufferPool} MB`],
      [
        'hashing',
        `${await stage.engine()}, m=${memoryKib}, t=${iterations}, p=${parallelism}, ${stage.slots} slots`,
      ],
      ['better-auth', await versionOf('better-auth')],
      [
        'scale',
        `${name}: ${scale.rounds} rounds of ${scale.seconds} s; medians, with the lowest and the highest round`,
      ],
    ],
  };
}

async function versionOf(packageName: string): Promise<string> {
  const file = new URL(`../node_modules/${packageName}/package.json`, import.meta.url);
  return JSON.parse(await readFile(file, 'utf8')).version;
}

function commit(): string {
  try {
    return execFileSync('git', ['describe', '--always', '--dirty'], { encoding: 'utf8' }).trim();
  } catch {
    return 'unknown';
  }
}
