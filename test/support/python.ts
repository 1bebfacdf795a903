/** A Python that can call gRPC services, for the tests that speak to Rekey as a caller in another language would. */
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { type DebianRoot, debianRoot, type Progress, toStderr } from './debian.ts';

export interface Python {
  /** The interpreter's command line, to be followed by a script or by options of its own. */
  command: string[];
  /** What has to be added to `process.env`, for both command lines. */
  env: Record<string, string>;
  /** The command line of a protobuf compiler that knows `--python_out` and `--grpc_python_out`. */
  protoc: string[];
}

const packages = ['python3-grpcio', 'python3-protobuf', 'protobuf-compiler', 'protobuf-compiler-grpc'];

/** The machine's own Python if it has gRPC, otherwise one with Debian's or Ubuntu's packages of it. */
export async function pythonWithGrpc(progress: Progress = toStderr): Promise<Python> {
  for (const program of ['python3', '/usr/bin/python3']) {
    const python = { command: [program], env: {}, protoc: [program, '-m', 'grpc_tools.protoc'] };
    if ((await whyUnusable(python)) === undefined) return python;
  }
  const python = pythonOf(await debianRoot({ name: 'python-grpc', packages }, progress));
  const reason = await whyUnusable(python);
  if (reason === undefined) return python;
  throw new Error(
    `The downloaded Python packages do not work: delete .cache/debian/python-grpc and try again, or install ${packages.join(', ')}.\n${reason}`,
  );
}

function pythonOf(root: DebianRoot): Python {
  const modules = join(root.directory, 'usr', 'lib', 'python3', 'dist-packages');
  const plugin = join(root.directory, 'usr', 'bin', 'grpc_python_plugin');
  const protoc = [...root.command('usr/bin/protoc'), `--plugin=protoc-gen-grpc_python=${plugin}`];
  const env = { ...root.env, PYTHONPATH: modules };
  // apt brings an interpreter along only where the system has none that fits.
  if (!existsSync(join(root.directory, 'usr', 'bin', 'python3'))) {
    return { command: ['/usr/bin/python3'], env, protoc };
  }
  const home = join(root.directory, 'usr');
  return { command: root.command('usr/bin/python3'), env: { ...env, PYTHONHOME: home }, protoc };
}

async function whyUnusable(python: Python): Promise<string | undefined> {
  const script = 'import grpc, google.protobuf; grpc.insecure_channel("127.0.0.1:1").close()';
  try {
    await run([...python.command, '-c', script], python.env);
    const version = await run([...python.protoc, '--version'], python.env);
    return knowsOptionalFields(version)
      ? undefined
      : `${version.trim()} is too old for proto3's optional fields.`;
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}

/** Those came with 3.15: https://github.com/protocolbuffers/protobuf/releases/tag/v3.15.0 */
function knowsOptionalFields(version: string): boolean {
  const [, major = 0, minor = 0] = /libprotoc (\d+)\.(\d+)/.exec(version)?.map(Number) ?? [];
  return major > 3 || (major === 3 && minor >= 15);
}

const checkout = join(import.meta.dirname, '..', '..');

/**
 * Writes the modules of every file in `proto/` to `directory`, which belongs on PYTHONPATH. Buf reads the sources, since
 * older compilers refuse an option they do not know, `debug_redact` for one, but pass it on when it is compiled already.
 */
export async function generatePythonStubs(python: Python, directory: string): Promise<void> {
  const sources = join(checkout, 'proto');
  const files = (await readdir(sources, { recursive: true })).filter((file) => file.endsWith('.proto'));
  const descriptors = join(directory, 'descriptors.binpb');
  await mkdir(directory, { recursive: true });
  await run([join(checkout, 'node_modules', '.bin', 'buf'), 'build', sources, '-o', descriptors]);
  const outputs = [`--python_out=${directory}`, `--grpc_python_out=${directory}`];
  await run([...python.protoc, `--descriptor_set_in=${descriptors}`, ...outputs, ...files], python.env);
}

async function run([program = '', ...args]: string[], env: Record<string, string> = {}): Promise<string> {
  const { stdout } = await promisify(execFile)(program, args, { env: { ...process.env, ...env } });
  return stdout;
}
