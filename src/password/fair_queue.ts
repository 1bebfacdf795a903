/**
 * A queue in which whoever floods waits for himself. Entries stand in a tree, one level for each part of their
 * path (application, peer, user); each level is served in turn, one entry a child, so that a child with a
 * thousand entries gets no more than its neighbour with one.
 */
export class FairQueue<T> {
  readonly #root = new Branch<T>();

  get size(): number {
    return this.#root.size;
  }

  push(path: readonly string[], entry: T): void {
    let branch = this.#root;
    branch.size++;
    for (const name of path) {
      const child = branch.children.get(name) ?? new Branch<T>();
      branch.children.set(name, child);
      branch = child;
      branch.size++;
    }
    branch.entries.add(entry);
  }

  /** The next entry in turn, or undefined if there is none. */
  shift(): T | undefined {
    return this.#root.shift();
  }

  /** @returns false if the entry is not there (any more). */
  delete(path: readonly string[], entry: T): boolean {
    const branches = this.#branches(path);
    if (branches.length <= path.length || !branches.at(-1)?.entries.delete(entry)) return false;
    forget(branches, path);
    return true;
  }

  /** How many of those that wait now would be served before a new entry of this path. */
  ahead(path: readonly string[]): number {
    const branches = this.#branches(path);
    let ahead = branches.length > path.length ? (branches.at(-1) as Branch<T>).size : 0;
    for (let depth = path.length - 1; depth >= 0; depth--) {
      const branch = branches[depth];
      if (!branch) continue;
      const own = ahead;
      for (const [name, child] of branch.children) {
        if (name !== path[depth]) ahead += Math.min(child.size, own + 1);
      }
    }
    return ahead;
  }

  /** Takes out the newest entry of whoever has the most entries waiting, level by level. */
  dropFromLongest(): T | undefined {
    const branches = [this.#root];
    const path: string[] = [];
    for (let branch = this.#root; branch.children.size > 0; ) {
      let longest: [string, Branch<T>] | undefined;
      for (const child of branch.children) if (!longest || child[1].size > longest[1].size) longest = child;
      path.push((longest as [string, Branch<T>])[0]);
      branch = (longest as [string, Branch<T>])[1];
      branches.push(branch);
    }
    const entries = branches.at(-1)?.entries;
    const newest = entries && [...entries].at(-1);
    if (newest === undefined) return undefined;
    entries?.delete(newest);
    forget(branches, path);
    return newest;
  }

  #branches(path: readonly string[]): Branch<T>[] {
    const branches = [this.#root];
    for (const name of path) {
      const child = branches.at(-1)?.children.get(name);
      if (!child) break;
      branches.push(child);
    }
    return branches;
  }
}

class Branch<T> {
  size = 0;
  readonly entries = new Set<T>();
  readonly children = new Map<string, Branch<T>>();

  shift(): T | undefined {
    if (this.size === 0) return undefined;
    this.size--;
    const next = this.children.entries().next();
    if (next.done) {
      const [entry] = this.entries;
      this.entries.delete(entry as T);
      return entry;
    }
    const [name, child] = next.value;
    const entry = child.shift();
    this.children.delete(name);
    if (child.size > 0) this.children.set(name, child);
    return entry;
  }
}

function forget<T>(branches: readonly Branch<T>[], path: readonly string[]): void {
  for (const [depth, branch] of branches.entries()) {
    branch.size--;
    if (branch.size === 0 && depth > 0) branches[depth - 1]?.children.delete(path[depth - 1] as string);
  }
}
