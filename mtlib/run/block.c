/* Batch norm, 2x2 max-pool, ReLU in one: its forward pass, its backward pass, and the backward pass of that.

   x (N, H, W, C) -> y (N, H/2, W/2, C), channels last in memory. Each pixel is read twice and written once: first
   all sums over a channel, then the result. xh = (x - mean) * rstd. Of each window are kept: xh of the largest
   k x + b, and which of the four it was, or OFF where the ReLU is. Sums are of BLOCK pixels at most in REAL, and of
   those in double, image by image, so that they do not depend on the number of threads. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

typedef REAL R;
typedef ptrdiff_t I;
enum { OFF = 4, BLOCK = 128 };
#define PIXELS const I h = H / 2, w = W / 2, n = N * H * W
#define IMAGES _Pragma("omp parallel for num_threads(threads)") for (I i = 0; i < N; i++)
#define EACH _Pragma("omp simd") for (I c = 0; c < C; c++)
#define AFTER(a, b) ((a) > (b) || (a) != (a))

/* Large outputs come as pages that nobody has touched; few large pages are much cheaper to get than many small ones. */
static void large_pages(void *start, size_t bytes)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, from = ((uintptr_t)start + page - 1) & ~(page - 1);
    if (bytes >= (size_t)4 << 20)
        madvise((void *)from, ((uintptr_t)start + bytes - from) & ~(page - 1), MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

/* total (K) = the sum over N images of part (N, K) */
static void add_images(const double *part, I N, I K, double *total)
{
    for (I k = 0; k < K; k++) total[k] = 0;
    for (I i = 0; i < N; i++)
        for (I k = 0; k < K; k++) total[k] += part[i * K + k];
}

static void add_block(R *block, I K, double *part)
{
    for (I k = 0; k < K; k++) part[k] += block[k], block[k] = 0;
}

/* part (2, C) = sums of d and of d^2 over the pixels of an image, d = x - near */
static void moments(const R *restrict x, const R *restrict near, I pixels, I C, double *part)
{
    R block[2 * C], *restrict a = block, *restrict b = block + C;
    for (I k = 0; k < 2 * C; k++) block[k] = part[k] = 0;
    for (I p = 0; p < pixels;) {
        const R *restrict u = x + p * C;
        if (p + 4 <= pixels) {
            EACH {
                R d = u[c] - near[c], e = u[C + c] - near[c], f = u[2 * C + c] - near[c], g = u[3 * C + c] - near[c];
                a[c] += (d + e) + (f + g), b[c] += (d * d + e * e) + (f * f + g * g);
            }
            p += 4;
        } else {
            EACH { R d = u[c] - near[c]; a[c] += d, b[c] += d * d; }
            p += 1;
        }
        if (p % BLOCK == 0) add_block(block, 2 * C, part);
    }
    add_block(block, 2 * C, part);
}

/* y, xh, won (N, H/2, W/2, C); mean, rstd (C). 0, or 1 where there is no memory. */
int forward(const R *x, const R *gamma, const R *beta, double eps, I N, I H, I W, I C, int threads,
            R *y, R *xh, uint8_t *won, R *mean, R *rstd)
{
    PIXELS;
    double *part = malloc((N + 1) * 2 * C * sizeof *part), *sum = part + N * 2 * C;
    R near[C], slope[C], level[C];
    if (!part) return 1;
    EACH near[c] = 0;
    moments(x, near, H * W, C, part); /* sums of squares lose no digits to a mean that is about right */
    EACH near[c] = part[c] / (H * W);
    IMAGES moments(x + i * H * W * C, near, H * W, C, part + i * 2 * C);
    add_images(part, N, 2 * C, sum);
    EACH {
        const double m = sum[c] / n, variance = sum[C + c] / n - m * m, r = 1 / sqrt((variance < 0 ? 0 : variance) + eps);
        mean[c] = near[c] + m, rstd[c] = r, slope[c] = gamma[c] * r, level[c] = beta[c] - (near[c] + m) * gamma[c] * r;
    }
    free(part);
    IMAGES for (I j = 0; j < h; j++) for (I k = 0; k < w; k++) {
        const R *restrict u = x + ((i * H + 2 * j) * W + 2 * k) * C, *restrict d = u + W * C;
        const I at = ((i * h + j) * w + k) * C;
        R *restrict py = y + at, *restrict px = xh + at;
        uint8_t *restrict pw = won + at;
        EACH {
            const R x0 = u[c], x1 = u[C + c], x2 = d[c], x3 = d[C + c], a = slope[c], b = level[c];
            const R t0 = x0 * a + b, t1 = x1 * a + b, t2 = x2 * a + b, t3 = x3 * a + b;
            const int one = AFTER(t1, t0); /* the first of equals; NaN comes through */
            const R best1 = one ? t1 : t0, from1 = one ? x1 : x0;
            const int two = AFTER(t2, best1);
            const R best2 = two ? t2 : best1, from2 = two ? x2 : from1;
            const int three = AFTER(t3, best2);
            const R best = three ? t3 : best2, from = three ? x3 : from2;
            const int which = three ? 3 : two ? 2 : one;
            py[c] = best <= 0 ? 0 : best;
            px[c] = (from - mean[c]) * rstd[c];
            pw[c] = best <= 0 ? OFF : which;
        }
    }
    return 0;
}

/* gx = gamma rstd (g - <g> - xh <g xh>), ggamma = n <g xh>, gbeta = n <g>, for g (N, H/2, W/2, C) at the winners. */
int backward(const R *g, const R *x, const R *xh, const uint8_t *won, const R *gamma, const R *mean, const R *rstd,
             I N, I H, I W, I C, int threads, R *gx, R *ggamma, R *gbeta)
{
    PIXELS;
    double *part = calloc((N + 1) * 2 * C, sizeof *part), *sum = part + N * 2 * C;
    R slope[C], level[C], scale[C];
    if (!part) return 1;
    large_pages(gx, n * C * sizeof(R));
    IMAGES {
        R block[2 * C], *restrict a = block, *restrict b = block + C;
        for (I k = 0; k < 2 * C; k++) block[k] = 0;
        for (I p = 0; p < h * w; p++) {
            const I at = (i * h * w + p) * C;
            EACH {
                const R on = won[at + c] < OFF ? g[at + c] : 0;
                a[c] += on, b[c] += on * xh[at + c];
            }
            if (p % BLOCK == BLOCK - 1) add_block(block, 2 * C, part + i * 2 * C);
        }
        add_block(block, 2 * C, part + i * 2 * C);
    }
    add_images(part, N, 2 * C, sum);
    EACH {
        gbeta[c] = sum[c], ggamma[c] = sum[C + c], scale[c] = gamma[c] * rstd[c];
        level[c] = -scale[c] * sum[c] / n, slope[c] = -scale[c] * rstd[c] * sum[C + c] / n;
    }
    free(part);
    IMAGES for (I j = 0; j < (H + 1) / 2; j++) for (I k = 0; k < (W + 1) / 2; k++) {
        const I here = ((i * H + 2 * j) * W + 2 * k) * C, at = ((i * h + j) * w + k) * C;
        const R *restrict u = x + here, *restrict d = u + W * C, *restrict pg = g + at;
        R *restrict ou = gx + here, *restrict od = ou + W * C;
        const uint8_t *restrict pw = won + at;
        if (j < h && k < w) EACH {
            const R t = scale[c] * pg[c];
            const int z = pw[c];
            ou[c] = slope[c] * (u[c] - mean[c]) + level[c] + (z == 0 ? t : 0);
            ou[C + c] = slope[c] * (u[C + c] - mean[c]) + level[c] + (z == 1 ? t : 0);
            od[c] = slope[c] * (d[c] - mean[c]) + level[c] + (z == 2 ? t : 0);
            od[C + c] = slope[c] * (d[C + c] - mean[c]) + level[c] + (z == 3 ? t : 0);
        } else for (I p = 2 * j; p < H && p < 2 * j + 2; p++) for (I q = 2 * k; q < W && q < 2 * k + 2; q++) {
            const I off = ((i * H + p) * W + q) * C; /* a row or a column that no window has */
            EACH gx[off + c] = slope[c] * (x[off + c] - mean[c]) + level[c];
        }
    }
    return 0;
}

/* With cotangents v, vgamma, vbeta of (gx, ggamma, gbeta): those of g, x and gamma, as `_Twice` in mtlib/norm.py has them. */
int twice(const R *v, const R *vgamma, const R *vbeta, const R *g, const R *x, const R *xh, const uint8_t *won,
          const R *gamma, const R *mean, const R *rstd, const R *ggamma, const R *gbeta,
          I N, I H, I W, I C, int threads, R *to_g, R *to_x, R *to_gamma)
{
    PIXELS;
    double *part = calloc((N + 1) * 3 * C, sizeof *part), *sum = part + N * 3 * C;
    R at_g[C], at_xh[C], level_g[C], from_g[C], from_v[C], from_x[C], level_x[C];
    if (!part) return 1;
    large_pages(to_x, n * C * sizeof(R));
    IMAGES {
        R block[3 * C], *restrict a = block, *restrict b = block + C, *restrict e = block + 2 * C;
        I seen = 0;
        for (I k = 0; k < 3 * C; k++) block[k] = 0;
        for (I j = 0; j < (H + 1) / 2; j++) for (I k = 0; k < (W + 1) / 2; k++) {
            const I here = ((i * H + 2 * j) * W + 2 * k) * C, at = ((i * h + j) * w + k) * C;
            const R *restrict u = x + here, *restrict d = u + W * C, *restrict vu = v + here, *restrict vd = vu + W * C;
            const R *restrict pg = g + at;
            const uint8_t *restrict pw = won + at;
            if (j < h && k < w) EACH {
                const int z = pw[c];
                const R m = mean[c], won_v = z == 0 ? vu[c] : z == 1 ? vu[C + c] : z == 2 ? vd[c] : z == 3 ? vd[C + c] : 0;
                a[c] += (vu[c] + vu[C + c]) + (vd[c] + vd[C + c]);
                b[c] += (vu[c] * (u[c] - m) + vu[C + c] * (u[C + c] - m)) + (vd[c] * (d[c] - m) + vd[C + c] * (d[C + c] - m));
                e[c] += z == OFF ? 0 : won_v * pg[c];
            } else for (I p = 2 * j; p < H && p < 2 * j + 2; p++) for (I q = 2 * k; q < W && q < 2 * k + 2; q++) {
                const I off = ((i * H + p) * W + q) * C;
                EACH a[c] += v[off + c], b[c] += v[off + c] * (x[off + c] - mean[c]);
            }
            if (++seen % (BLOCK / 4) == 0) add_block(block, 3 * C, part + i * 3 * C);
        }
        add_block(block, 3 * C, part + i * 3 * C);
    }
    add_images(part, N, 3 * C, sum);
    EACH {
        const double r = rstd[c], k = gamma[c] * r, g0 = (double)gbeta[c] / n, g1 = (double)ggamma[c] / n;
        const double v0 = sum[c] / n, v1 = r * sum[C + c] / n, q = sum[2 * C + c] / n - g0 * v0 - g1 * v1, s = vgamma[c] - k * v1;
        at_g[c] = k, at_xh[c] = s, level_g[c] = vbeta[c] - k * v0;
        from_g[c] = r * s, from_v[c] = -r * k * g1, from_x[c] = -r * r * (g1 * (vgamma[c] - 2 * k * v1) + k * q);
        level_x[c] = -r * (g0 * vgamma[c] - k * (g0 * v1 + g1 * v0)), to_gamma[c] = n * r * q;
    }
    free(part);
    IMAGES for (I j = 0; j < (H + 1) / 2; j++) for (I k = 0; k < (W + 1) / 2; k++) {
        const I here = ((i * H + 2 * j) * W + 2 * k) * C, at = ((i * h + j) * w + k) * C;
        const R *restrict u = x + here, *restrict d = u + W * C, *restrict vu = v + here, *restrict vd = vu + W * C;
        R *restrict ou = to_x + here, *restrict od = ou + W * C, *restrict og = to_g + at;
        const R *restrict pg = g + at, *restrict px = xh + at;
        const uint8_t *restrict pw = won + at;
        if (j < h && k < w) EACH {
            const int z = pw[c];
            const R m = mean[c], t = from_g[c] * pg[c];
            const R won_v = z == 0 ? vu[c] : z == 1 ? vu[C + c] : z == 2 ? vd[c] : vd[C + c];
            og[c] = z == OFF ? 0 : at_g[c] * won_v + at_xh[c] * px[c] + level_g[c];
            ou[c] = from_v[c] * vu[c] + from_x[c] * (u[c] - m) + level_x[c] + (z == 0 ? t : 0);
            ou[C + c] = from_v[c] * vu[C + c] + from_x[c] * (u[C + c] - m) + level_x[c] + (z == 1 ? t : 0);
            od[c] = from_v[c] * vd[c] + from_x[c] * (d[c] - m) + level_x[c] + (z == 2 ? t : 0);
            od[C + c] = from_v[c] * vd[C + c] + from_x[c] * (d[C + c] - m) + level_x[c] + (z == 3 ? t : 0);
        } else for (I p = 2 * j; p < H && p < 2 * j + 2; p++) for (I q = 2 * k; q < W && q < 2 * k + 2; q++) {
            const I off = ((i * H + p) * W + q) * C;
            EACH to_x[off + c] = from_v[c] * v[off + c] + from_x[c] * (x[off + c] - mean[c]) + level_x[c];
        }
    }
    return 0;
}
