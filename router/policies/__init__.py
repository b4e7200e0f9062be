"""Routing policies. Pure: no torch, ray, asyncio or clock."""
