"""The bus: events from the gateway to the components, transactions back (docs/events.md)."""
