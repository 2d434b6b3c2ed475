"""A server with OpenAI's completions, over HTTP, that generates with a real model."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Completions:
    """What the server does; ``faults`` are status codes of its next replies, ``strict`` refuses what OpenAI lacks."""

    def __init__(self, folder, *, strict=False):
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.strict, self.faults, self.requests = strict, [], []
        self._lock = threading.Lock()  # the generator of random numbers is one for all threads

    def reply(self, path, body):
        if body is None:
            return 200, {"data": [{"id": "small"}]}
        self.requests.append((path, body))
        if self.faults:
            return self.faults.pop(0), {"error": "not now"}
        own = {"model", "prompt", "messages", "n", "temperature", "top_p", "max_tokens", "seed"}
        if self.strict and (body["n"] > 1 or set(body) - own):
            return 422, {"error": "unknown field"}
        if path == "/v1/chat/completions":
            ids = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]
        else:
            prompt = body["prompt"]
            ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        with self._lock, torch.inference_mode():
            torch.manual_seed(body["seed"])
            out = self.model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=True,
                temperature=body["temperature"],
                top_k=0,
                num_return_sequences=body["n"],
                max_new_tokens=body["max_tokens"],
                eos_token_id=body.get("stop_token_ids", self.tokenizer.eos_token_id),
            )
        choices = [self._choice(row[len(ids) :], path) for row in out.tolist()]
        return 200, {"choices": choices, "usage": {"prompt_tokens": len(ids)}}

    def _choice(self, ids, path):
        end = next((place for place, token in enumerate(ids) if token in self.tokenizer.all_special_ids), None)
        text = self.tokenizer.decode(ids[:end])
        said = {"message": {"content": text}} if "chat" in path else {"text": text}
        return said | {"finish_reason": "length" if end is None else "stop"}


@contextmanager
def serving(completions):
    """Serve on this host; yields the address up to ``/v1``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(*completions.reply(self.path, None))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*completions.reply(self.path, body))

        def _send(self, code, value):
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
