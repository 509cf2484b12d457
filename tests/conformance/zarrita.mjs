// In: a cache's folder. Out: JSON, for each array its shape and the SHA-256 of its values, as zarrita reads them; arrays of
// a type that this Node has not are left out. Needs `npm install zarrita @zarrita/storage` where it lies.

import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { FileSystemStore } from "@zarrita/storage";
import * as zarr from "zarrita";

const folder = resolve(process.argv[2]);
const found = {};
for (const name of readdirSync(folder)) {
  const metadata = join(folder, name, "zarr.json");
  if (!existsSync(metadata)) continue;
  const type = JSON.parse(readFileSync(metadata)).data_type;
  if (type === "float16" && typeof Float16Array === "undefined") continue;
  const array = await zarr.open.v3(new FileSystemStore(join(folder, name)), { kind: "array" });
  const { data, shape } = await zarr.get(array);
  const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
  found[name] = { shape, sha256: createHash("sha256").update(bytes).digest("hex") };
}
console.log(JSON.stringify(found));
