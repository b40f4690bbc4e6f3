"""Review a data set or a predictions file in the browser: see the page, see the difference, fix the data.

    python -m server <jsonl> [-i <image-dir>] [-p <port>]

The file itself is never touched. Every decision is written at once to <jsonl>.review.jsonl; --export makes a data set
of both that train takes. A file that predict is still writing is followed. UI.md says how to work with it.
"""

import argparse
import secrets
import socket
import sys
from pathlib import Path

from mistral_ft.cli import ArgumentParser, run_step
from mistral_ft.data.predictions import find_predictions
from mistral_ft.errors import UserError
from mistral_ft.folders import locate


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m server", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", help="JSONL file of records, with `actual` or without")
    parser.add_argument("-i", "--images_dir", help="folder that image paths are relative to (default: the file's own)")
    parser.add_argument("--max_image_pixels", type=int, help="pixels an image may have (default: 178 million)")
    parser.add_argument("--pdf_seconds", type=float, help="seconds of work a page of a PDF may take (default: 20)")
    parser.add_argument("-p", "--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument(
        "--token", nargs="?", const="", help="what others must know to get in; without a value one is made up"
    )
    parser.add_argument("--compare", metavar="OTHER", help="another predictions file of the same records")
    parser.add_argument(
        "--model", help="a run's name, or a model's folder, for the token view (default: output/<name>, if it is there)"
    )
    parser.add_argument(
        "--runs_dir", help="folder of training runs whose progress is shown (default: output, if it is there)"
    )
    parser.add_argument("--export", metavar="FILE", help="write the corrected data set to FILE and end")
    args = parser.parse_args()
    if not 0 <= args.port < 65536:
        parser.error(f"--port {args.port}: must be between 0 and 65535")
    if args.token and len(args.token) < 16:
        parser.error("--token: give at least 16 characters, or none to have one made up")
    return args


def check_input(name: str) -> Path:
    """The file, if it or predict's unfinished one is there.

    Raises:
        UserError: if there is neither.
    """
    path = Path(name.removesuffix(".partial") if name.endswith(".jsonl.partial") else name)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected a JSONL file in it, such as {path / 'train.jsonl'}")
    if not find_predictions(path).is_file():
        raise UserError(f"{path}: no such file")
    return path


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: if the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Named as TCP, or asyncio leaves its delay of 40 ms on.
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
        return listening
    except OSError as error:
        raise UserError(f"cannot listen at {host}, port {port}: {error.strerror}; try another -p or --host") from None


def main() -> None:
    # 1. Arguments.
    args = parse_arguments()
    path = check_input(args.file)
    images_dir = Path(args.images_dir) if args.images_dir else path.parent
    if not images_dir.is_dir():
        raise UserError(f"{images_dir}: no such folder of images; give it with -i")
    if args.runs_dir and not Path(args.runs_dir).is_dir():
        raise UserError(f"--runs_dir {args.runs_dir}: no such folder; give the --output_dir of train")
    runs_dir = Path(args.runs_dir or "output")

    # 2. Only the data set of an earlier review?
    if args.export:
        from mistral_ft.review.export import export

        done = export(path, args.export)
        for reason in done.left_out:
            print(f"left out: {path}:{reason}", file=sys.stderr)
        print(f"{done.count} records in {done.path}: {done.edited} corrected, {done.reviewed} reviewed, "
              f"{done.flagged} flagged")  # fmt: skip
        print(f"python -m train --dataset {done.path} --images_dir {images_dir}")
        return

    # 3. Who may come in.
    from mistral_ft.review.guard import Guard, ImpatientProtocol, is_loopback

    token = secrets.token_urlsafe(24) if args.token == "" else args.token
    if not is_loopback(args.host) and not token:
        raise UserError(f"--host {args.host}: others could read and change the data; add --token to ask for one")

    # 4. The files, and the log of the review.
    import uvicorn

    from mistral_ft.data.pages import limit_pages
    from mistral_ft.review.app import ReviewApp
    from mistral_ft.review.desk import Desk
    from mistral_ft.review.log import ReviewLog
    from mistral_ft.review.tokens import TokenView, find_run

    other = check_input(args.compare) if args.compare else None
    if other and other.resolve() == path.resolve():
        raise UserError(f"--compare {other}: is the file itself")
    limit_pages(args.max_image_pixels, args.pdf_seconds)
    listening = listen(args.host, args.port)
    port = listening.getsockname()[1]
    log = ReviewLog(path)
    tokens = TokenView(locate(args.model) if args.model else find_run(path))
    app = ReviewApp(Desk(path, log, other), images_dir, tokens, runs_dir if runs_dir.is_dir() else None)

    # 5. Serve until Ctrl-C.
    config = uvicorn.Config(
        Guard(app.starlette(), args.host, port, token),
        http=ImpatientProtocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        server_header=False,
        limit_concurrency=200,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=32 << 10,
    )
    name = f"[{args.host}]" if ":" in args.host else args.host
    print(f"Reviewing {path} on http://{name}:{port}/{f'?token={token}' if token else ''}", flush=True)
    print(f"Decisions go to {log.path}; stop with Ctrl-C", flush=True)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        print("Stopped", file=sys.stderr)
    finally:
        log.close()


if __name__ == "__main__":
    run_step(main, unix_only=True)
