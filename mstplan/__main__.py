from .cli import process

process()
