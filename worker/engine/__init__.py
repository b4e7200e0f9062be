"""The engine's brain: what runs in the next step. Pure; no torch, ray, asyncio or clock."""
