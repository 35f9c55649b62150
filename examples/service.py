"""A prediction service: POST an image, get its label, probability and experts as JSON.

    hubpath fit --preset tiny --dataset digits --out my-run
    python examples/service.py my-run --port 8000
    curl --data-binary @photo.jpg http://127.0.0.1:8000

It answers one request after another, to this machine only, and trusts who asks.
"""

from __future__ import annotations

import argparse
import io
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from PIL import Image

from hubpath_fast.data import eval_transform
from hubpath_fast.hub import expert_names
from hubpath_fast.runs.folder import open_run


class Handler(BaseHTTPRequestHandler):
    @torch.no_grad()
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            image = Image.open(io.BytesIO(body)).convert("RGB")
        except OSError as error:
            return self.answer(400, {"error": str(error)})
        batch = transform(image)[None]  # uint8 [1, 3, S, S]: normalised inside, expert by expert
        routing = run.model.route(batch)
        probabilities = run.model(batch, routing=routing)[0].softmax(dim=0)
        probability, label = probabilities.max(dim=0)
        asked = [names[i] for i in routing.experts[0].tolist()]
        experts = dict(zip(asked, routing.weights[0].tolist(), strict=True))
        answer = {"label": run.classes[label], "probability": probability.item()}
        self.answer(200, answer | {"experts": experts})

    def answer(self, status: int, content: dict) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("run", help="folder of a run of `hubpath fit`")
parser.add_argument("--port", type=int, default=8000)
args = parser.parse_args()
run = open_run(args.run)
names, transform = expert_names(run.config.hub), eval_transform(run.image_size)
server = HTTPServer(("127.0.0.1", args.port), Handler)
print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
