/** Three MySQL servers on this machine as a Group Replication group with one primary: what Rekey is meant to run on. */
import { randomBytes, randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import mysql, { type RowDataPacket } from 'mysql2/promise';
import { type Progress, toStderr } from './debian.ts';
import { freePort, type PrivateDatabase, startPrivateDatabase } from './private_database.ts';

export interface ReplicationGroup {
  /** `url()` of each works while it runs; only the primary's takes writes. */
  readonly nodes: readonly PrivateDatabase[];
  /** The node that takes writes; waits while the group is choosing one. */
  primary(): Promise<PrivateDatabase>;
  /** Ends a node as a power cut would. The others expel it and choose a new primary after some 10 to 20 s. */
  kill(node: PrivateDatabase): Promise<void>;
  /**
   * Starts a node again and waits until it has caught up. The first one after all were down founds the group anew: that must
   * be the last primary, or what only that one had written is lost.
   */
  restart(node: PrivateDatabase): Promise<void>;
  dispose(): Promise<void>;
}

export interface ReplicationGroupOptions {
  progress?: Progress;
  /** More server options for every node, such as `--group-replication-member-expel-timeout=0`; they win over the ones chosen here. */
  args?: string[];
}

const size = 3;

export async function startReplicationGroup({
  progress = toStderr,
  args = [],
}: ReplicationGroupOptions = {}): Promise<ReplicationGroup> {
  const password = randomBytes(16).toString('hex');
  const groupName = randomUUID();
  const groupPorts: number[] = [];
  while (groupPorts.length < size) {
    const port = await freePort();
    if (!groupPorts.includes(port)) groupPorts.push(port);
  }
  const nodes: PrivateDatabase[] = [];
  const dispose = async () => void (await Promise.all(nodes.map((node) => node.dispose())));
  try {
    for (const [index, groupPort] of groupPorts.entries()) {
      const nodeArgs = [...groupOptions(groupName, index, groupPort, groupPorts), ...args];
      nodes.push(await startPrivateDatabase({ kind: 'mysql', password, args: nodeArgs, progress }));
      await joinGroup(nodes, index);
    }
  } catch (error) {
    await dispose();
    throw error;
  }
  progress(`The group of ${size} is complete.`);

  return {
    nodes,
    primary: () => findPrimary(nodes),
    kill: (node) => node.kill(),
    async restart(node) {
      await node.start();
      await joinGroup(nodes, nodes.indexOf(node));
    },
    dispose,
  };
}

function groupOptions(groupName: string, index: number, groupPort: number, groupPorts: number[]): string[] {
  return [
    `--server-id=${index + 1}`,
    '--gtid-mode=ON',
    '--enforce-gtid-consistency=ON',
    '--report-host=127.0.0.1',
    '--plugin-load-add=group_replication.so',
    `--group-replication-group-name=${groupName}`,
    `--group-replication-local-address=127.0.0.1:${groupPort}`,
    `--group-replication-group-seeds=${groupPorts.map((port) => `127.0.0.1:${port}`).join(',')}`,
    // A node that starts by itself would look for a group that may not be there yet.
    '--group-replication-start-on-boot=OFF',
    '--group-replication-recovery-get-public-key=ON',
    // The least that is allowed; the default lets the cache of messages grow to 1 GiB.
    '--group-replication-message-cache-size=134217728',
  ];
}

/** Takes a running node into the group, or founds the group with it when no other one runs. */
async function joinGroup(nodes: readonly PrivateDatabase[], index: number): Promise<void> {
  const node = nodes[index];
  if (!node) throw new Error('That node is not one of this group.');
  const founds = nodes.every((other) => other === node || other.pid === undefined);
  const { username, password } = new URL(node.url());
  const connection = await mysql.createConnection({ uri: node.url() });
  try {
    if (founds) await connection.query('SET GLOBAL group_replication_bootstrap_group = ON');
    await connection.query(`START GROUP_REPLICATION USER = '${username}', PASSWORD = '${password}'`);
    if (founds) await connection.query('SET GLOBAL group_replication_bootstrap_group = OFF');
  } finally {
    connection.destroy();
  }
  await until(
    async () =>
      (await members(node)).find((member) => member.port === node.port && member.state === 'ONLINE'),
    `The server on port ${node.port} did not come online in its group: see ${node.errorLog}.`,
  );
}

async function findPrimary(nodes: readonly PrivateDatabase[]): Promise<PrivateDatabase> {
  return await until(async () => {
    for (const node of nodes) {
      if (node.pid === undefined) continue;
      const leading = (await members(node)).find(
        (member) => member.role === 'PRIMARY' && member.state === 'ONLINE',
      );
      const primary = nodes.find((candidate) => candidate.port === leading?.port);
      if (primary?.pid !== undefined && (await isWritable(primary))) return primary;
    }
    return undefined;
  }, 'The group chose no primary: more than half of its nodes must be running.');
}

interface Member {
  port: number;
  state: string;
  role: string;
}

/** The group as one node sees it; empty when it does not answer. */
async function members(node: PrivateDatabase): Promise<Member[]> {
  const rows = await ask(
    node,
    'SELECT member_port AS port, member_state AS state, member_role AS role FROM performance_schema.replication_group_members',
  );
  return rows as unknown as Member[];
}

/** A node is named primary a moment before it takes writes. */
async function isWritable(node: PrivateDatabase): Promise<boolean> {
  const [row] = await ask(node, 'SELECT @@GLOBAL.super_read_only AS readOnly');
  return row?.readOnly === 0;
}

async function ask(node: PrivateDatabase, query: string): Promise<RowDataPacket[]> {
  try {
    const connection = await mysql.createConnection({ uri: node.url(), connectTimeout: 2000 });
    try {
      const [rows] = await connection.query<RowDataPacket[]>({ sql: query, timeout: 5000 });
      return rows;
    } finally {
      connection.destroy();
    }
  } catch {
    return [];
  }
}

/** Longer than the group takes to expel a silent member and to choose a new primary with MySQL's defaults (21 s). */
const patienceMilliseconds = 90_000;

async function until<T>(look: () => Promise<T | undefined>, otherwise: string): Promise<T> {
  const deadline = Date.now() + patienceMilliseconds;
  for (;;) {
    const found = await look();
    if (found !== undefined) return found;
    if (Date.now() > deadline) throw new Error(otherwise);
    await sleep(100);
  }
}
