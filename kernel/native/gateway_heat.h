/* gateway, part: the access monitor's hands, and pages that come back before they are asked for. What to look at, and when, kernel/heat.py says. */

/* ---------------------------------------------------------------- heat */
int sy_gw_heat_fd(struct sy_gateway *g) { return g->heat_ro; }
int sy_gw_slots_fd(struct sy_gateway *g) { return g->slots_ro; }
uint32_t sy_gw_sample(struct sy_gateway *g, uint32_t *pfn, uint32_t *barrier, uint32_t n) {
  uint32_t k = 0;
  pthread_mutex_lock(&g->lock);
  for (uint32_t i = 0; i < n; i++) {
    struct sy_frame *f = pfn[i] < g->nframes ? &g->frames[pfn[i]] : NULL;
    /* (what is about to leave kswapd has looked at) */
    if (!f || f->state != SY_FRAME_MAPPED || f->flags & (SY_FF_SWAPPING | SY_FF_STANDBY)) continue;
    if (!(f->flags & SY_FF_AGED)) {
      if (take_run(g, pfn[i], 1, SY_FF_AGED) != SY_R_COMPLETE) continue;
      count(g, SY_CNT_SAMPLED, 1);
    }
    pfn[k] = pfn[i], barrier[k++] = f->barrier;
  }
  pthread_mutex_unlock(&g->lock);
  poke(g);
  return k;
}
uint32_t sy_gw_look(struct sy_gateway *g, const uint32_t *pfn, const uint32_t *barrier, const uint8_t *touched, uint32_t n, uint32_t source, uint32_t *looked) {
  uint32_t warm = 0;
  *looked = 0;
  pthread_mutex_lock(&g->lock);
  for (uint32_t i = 0; i < n; i++) {
    const struct sy_frame *f = pfn[i] < g->nframes ? &g->frames[pfn[i]] : NULL;
    if (!f || f->state != SY_FRAME_MAPPED || (barrier && f->barrier != barrier[i])) continue;
    struct sy_heat *h = &g->heat[pfn[i]];
    uint8_t now = touched ? touched[i] != 0 : !(f->flags & SY_FF_AGED);
    *h = (struct sy_heat){(uint8_t)(h->seen >> 1 | now << 7), (uint8_t)(h->looks < 8 ? h->looks + 1 : 8), (uint8_t)source, (uint8_t)g->hdr->monitor.windows};
    warm += now, ++*looked;
  }
  pthread_mutex_unlock(&g->lock);
  return warm;
}
void sy_gw_monitor(struct sy_gateway *g, const struct sy_monitor *m) {
  int ended = m->windows != g->hdr->monitor.windows;
  g->hdr->monitor = *m;
  if (ended) event(g, (struct sy_msg){.type = SY_MSG_HEAT_READY, .npages = m->looked, .arg = m->windows});
}

/* ---------------------------------------------------------------- prefetch */
static int prefetch_stopped(const struct as *a) { return a->prefetch_told_ns && a->prefetching && now_ns() > a->prefetch_told_ns + STOPPED_NS; }
/* kswapd wants a page back (under lock): if it is where kswapd saw it, and there are frames above the low watermarks, also when all that are on their way
 * have come. */
static uint32_t prefetch(struct sy_gateway *g, const struct sy_op *op) {
  struct as *a = find_as(g, op->asid);
  const struct sy_stored *s = &g->slot[op->pfn];
  uint64_t room = 0, coming = 0;
  if (!a || a->dying || a->released) return SY_R_NOT_FOUND;
  if (s->asid != op->asid || s->vpage != op->arg || s->out != op->barrier) return SY_R_STALE;
  for (uint32_t i = 0; i < g->nodes; i++) {
    const struct sy_watermarks *m = &g->hdr->watermark[i];
    room += m->free > m->low ? m->free - m->low : 0;
  }
  const struct sy_watermarks *mine = &g->hdr->watermark[a->zone];
  if (a->zone && mine->free < mine->low + room) room = mine->free > mine->low ? mine->free - mine->low : 0;
  for (uint32_t i = 0; i < g->nas; i++) coming += prefetch_stopped(g->as[i]) ? 0 : g->as[i]->prefetching;
  if (coming >= room) return SY_R_FULL;
  struct wish *last = &g->prefetch[(g->prefetch_head - 1) % PREFETCH_RING];
  if (g->prefetch_head != g->prefetch_tail && last->asid == a->asid && last->vpage + last->n == op->arg && last->n < SY_PREFETCH_PAGES)
    last->n++;
  else if (g->prefetch_head - g->prefetch_tail == PREFETCH_RING || prefetch_stopped(a))
    return SY_R_BUSY;
  else
    g->prefetch[g->prefetch_head++ % PREFETCH_RING] = (struct wish){a->asid, (uint32_t)op->arg, 1};
  a->prefetching++;
  return SY_R_COMPLETE;
}
/* Server thread: it has brought back what it could of so many pages. */
static void prefetched(struct sy_gateway *g, struct as *a, uint64_t n) {
  pthread_mutex_lock(&g->lock);
  a->prefetching -= n, a->prefetch_told_ns = a->prefetching ? now_ns() : 0;
  pthread_mutex_unlock(&g->lock);
}
