// node encode.mjs FOLDER TEXTS.json [protect]: token ids of the texts as the JavaScript reader makes them, as JSON.
// With "protect", special tokens first become ordinary words of the vocabulary, as eval/README.md says.
import fs from "fs";
import { createRequire } from "module";

const { Tokenizer } = createRequire(process.env.ANCHOR_NODE_MODULES + "/")("@huggingface/tokenizers");
const [folder, texts, protect] = process.argv.slice(2);
const read = (path) => JSON.parse(fs.readFileSync(path, "utf8"));
const file = read(folder + "/tokenizer.json");
if (protect) {
  for (const token of file.added_tokens) if (token.special) file.model.vocab[token.content] = token.id;
  file.added_tokens = file.added_tokens.filter((token) => !token.special);
}
const tokenizer = new Tokenizer(file, read(folder + "/tokenizer_config.json"));
console.log(JSON.stringify(read(texts).map((text) => tokenizer.encode(text).ids)));
